"""What the Pallas kernels take. Each answer names the value, what is allowed, and the way out."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.block_sizes import tpu, tpu_vmem, triton
from pallas_kernels.block_sizes.triton import HEAD_WIDTHS

INTERVAL_WIDTHS = (64, 80, 128)  # 80 is that of Qwen2.5-VL's vision tower
MOST_HEADS = 16  # query heads per KV head
BLOCK_SIZES = (32, 64)
_WAY_OUT = "or implementation='xla'"


@dataclasses.dataclass(frozen=True)
class Call:
    """What an operation asks of its kernels.

    Attributes:
      op: its name.
      width: values per head.
      group: query heads per KV head.
      dtypes: names of those of q, k and v, each once.
      block: keys per block, where chosen blocks are attended to; None: they are not.
      chosen_from: keys of which these blocks are chosen.
      ranked: block means that are ranked.
    """

    op: str
    width: int
    group: int
    dtypes: tuple[str, ...]
    block: int | None = None
    chosen_from: int = 0
    ranked: int = 0

    @classmethod
    def of(cls, op: str, q: jax.Array, k: jax.Array, v: jax.Array, **blocks: int) -> "Call":
        """For q [b s n h] and k, v [b t k h]; `blocks` are the last three attributes."""
        dtypes = sorted({jnp.dtype(x.dtype).name for x in (q, k, v)})
        return cls(op, q.shape[3], q.shape[2] // k.shape[2], tuple(dtypes), **blocks)


def by_xla(call: Call, *, backward: bool) -> None:
    """Nothing is unsupported."""


def by_triton(call: Call, *, backward: bool) -> str | None:
    """Why the Triton kernels do not take a call; None if they do."""
    return _unsupported_reason(call, "Triton kernel", triton.DTYPES)


def by_mosaic_tpu(call: Call, *, backward: bool) -> str | None:
    """Why the TPU kernels do not take a call, or not its gradients; None if they do."""
    reason = _unsupported_reason(call, "TPU kernel", tpu.DTYPES)
    if reason is None and call.block is not None:
        reason = tpu_vmem.keys_unsupported_reason(
            call.chosen_from, call.dtypes[0], call.block, backward=backward
        )
    return reason or tpu_vmem.blocks_unsupported_reason(call.ranked, call.dtypes[0])


def _unsupported_reason(call, kernel, dtypes):
    widths = INTERVAL_WIDTHS if call.op == "interval_attention" else HEAD_WIDTHS
    if call.block is not None and call.block not in BLOCK_SIZES:
        return f"block size {call.block} has no {kernel}; use one of {BLOCK_SIZES} {_WAY_OUT}"
    if call.width not in widths:
        return f"head width {call.width} has no {kernel}; use one of {widths} {_WAY_OUT}"
    if call.group > MOST_HEADS:
        return (
            f"{call.group} query heads per KV head have no {kernel}; use at most {MOST_HEADS} "
            f"{_WAY_OUT}"
        )
    if len(call.dtypes) > 1 or call.dtypes[0] not in dtypes:
        return (
            f"dtypes {list(call.dtypes)} of q, k, v have no {kernel}; use one of {dtypes} for all "
            f"{_WAY_OUT}"
        )
    return None
