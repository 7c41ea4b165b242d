"""How the TPU kernels cut their work, per generation. Results depend on it by rounding only."""

import dataclasses

DTYPES = ("bfloat16", "float32")
LANES = 128  # of a vector register: head widths are filled up to it with zeros


@dataclasses.dataclass(frozen=True)
class TPUSizes:
    """The sizes for one generation of TPUs.

    Attributes:
      vmem: bytes of a core's vector memory that a kernel may take.
      rows: queries per tile of attention over ranges, each with all heads of a group.
      keys: keys per step of attention over ranges.
      queries: queries per tile of attention over chosen blocks, each with all heads of a group.
      blocks: chosen blocks per step; together they fill the matrix unit.
    """

    vmem: int
    rows: int
    keys: int
    queries: int
    blocks: int


_V5E = TPUSizes(vmem=100 * 2**20, rows=128, keys=256, queries=16, blocks=2)
_V5P = dataclasses.replace(_V5E, vmem=56 * 2**20)
_V6E = TPUSizes(vmem=100 * 2**20, rows=256, keys=256, queries=32, blocks=4)

# The names under which JAX knows the devices.
_KINDS = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
}


def pick(device_kind: str) -> TPUSizes:
    """The sizes for a device; those with the least memory where the device is not in the table."""
    return _KINDS.get(device_kind, _V5P)
