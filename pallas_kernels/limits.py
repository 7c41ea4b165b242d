"""What the Triton kernels take. Each answer names the value, what is allowed, and the way out."""

import jax
import jax.numpy as jnp

from pallas_kernels.tiles import DTYPES, HEAD_WIDTHS

INTERVAL_WIDTHS = (64, 80, 128)  # 80 is that of Qwen2.5-VL's vision tower
MOST_HEADS = 16  # query heads per KV head
BLOCK_SIZES = (32, 64)
_WAY_OUT = "or implementation='xla'"


def attention_misfit(
    q: jax.Array, k: jax.Array, v: jax.Array, widths: tuple[int, ...] = HEAD_WIDTHS
) -> str | None:
    """Why the kernels cannot attend with q [b s n h] to k, v [b t k h]; None if they can."""
    width, group = q.shape[3], q.shape[2] // k.shape[2]
    dtypes = {jnp.dtype(x.dtype).name for x in (q, k, v)}
    if width not in widths:
        return f"head width {width} has no Triton kernel; use one of {widths} {_WAY_OUT}"
    if group > MOST_HEADS:
        return (
            f"{group} query heads per KV head have no Triton kernel; use at most {MOST_HEADS} "
            f"{_WAY_OUT}"
        )
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return (
            f"dtypes {sorted(dtypes)} of q, k, v have no Triton kernel; use one of {DTYPES} for "
            f"all {_WAY_OUT}"
        )
    return None


def block_misfit(size: int) -> str | None:
    """Why the kernels cannot select blocks of `size` keys; None if they can."""
    if size not in BLOCK_SIZES:
        return f"block size {size} has no Triton kernel; use one of {BLOCK_SIZES} {_WAY_OUT}"
    return None
