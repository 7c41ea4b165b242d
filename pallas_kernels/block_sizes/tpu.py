"""How the TPU kernels cut their work, per generation. Results depend on it by rounding only."""

import dataclasses

DTYPES = ("bfloat16", "float32")
LANES = 128  # of a vector register: head widths are filled up to it with zeros


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """The sizes for one generation of TPUs.

    Attributes:
      vmem: bytes of a core's vector memory that a kernel may take.
      block_q: queries per tile of attention over ranges, each with all heads of a group.
      block_kv: keys per step of attention over ranges.
      selected_block_q: queries per tile of attention over chosen blocks, likewise.
      blocks_per_step: chosen blocks per step; together they fill the matrix unit.
    """

    vmem: int
    block_q: int
    block_kv: int
    selected_block_q: int
    blocks_per_step: int


_V5E = BlockSizes(
    vmem=100 * 2**20, block_q=128, block_kv=256, selected_block_q=16, blocks_per_step=2
)
_V5P = dataclasses.replace(_V5E, vmem=56 * 2**20)
_V6E = dataclasses.replace(_V5E, block_q=256, selected_block_q=32, blocks_per_step=4)

# The names under which JAX knows the devices.
_KINDS = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
}


def pick(device_kind: str) -> BlockSizes:
    """The sizes for a device; those with the least memory where the device is not in the table."""
    return _KINDS.get(device_kind, _V5P)
