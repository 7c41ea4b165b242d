"""What the Pallas kernels take. Each answer names the value, what is allowed, and the way out."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sizes import tpu as tpu_sizes
from pallas_kernels.block_sizes import tpu_vmem as mosaic_memory
from pallas_kernels.block_sizes import triton as tiles
from pallas_kernels.block_sizes.triton import HEAD_WIDTHS

INTERVAL_WIDTHS = (64, 80, 128)  # 80 is that of Qwen2.5-VL's vision tower
MOST_HEADS = 16  # query heads per KV head
BLOCK_SIZES = (32, 64)
_DTYPES = {"triton": tiles.DTYPES, "mosaic_tpu": tpu_sizes.DTYPES}
_KERNELS = {"triton": "Triton kernel", "mosaic_tpu": "TPU kernel"}
_WAY_OUT = "or implementation='xla'"


def attention_misfits(
    q: jax.Array, k: jax.Array, v: jax.Array, widths: tuple[int, ...] = HEAD_WIDTHS
) -> dict[str, str]:
    """Which kernels cannot attend with q [b s n h] to k, v [b t k h]: {implementation: why}."""
    width, group = q.shape[3], q.shape[2] // k.shape[2]
    dtypes = {jnp.dtype(x.dtype).name for x in (q, k, v)}
    why = {}
    for name, kernel in _KERNELS.items():
        if width not in widths:
            why[name] = f"head width {width} has no {kernel}; use one of {widths} {_WAY_OUT}"
        elif group > MOST_HEADS:
            why[name] = (
                f"{group} query heads per KV head have no {kernel}; use at most {MOST_HEADS} "
                f"{_WAY_OUT}"
            )
        elif len(dtypes) > 1 or not dtypes <= set(_DTYPES[name]):
            why[name] = (
                f"dtypes {sorted(dtypes)} of q, k, v have no {kernel}; use one of {_DTYPES[name]} "
                f"for all {_WAY_OUT}"
            )
    return why


def block_misfits(size: int) -> dict[str, str]:
    """Which kernels cannot select blocks of `size` keys: {implementation: why}."""
    if size in BLOCK_SIZES:
        return {}
    return {
        name: f"block size {size} has no {kernel}; use one of {BLOCK_SIZES} {_WAY_OUT}"
        for name, kernel in _KERNELS.items()
    }


def selected_misfits(q: jax.Array, k: jax.Array, v: jax.Array, block: int) -> dict[str, str]:
    """Which kernels cannot attend to chosen blocks of `block` keys: {implementation: why}."""
    why = mosaic_memory.keys_misfit(k.shape[1], k.dtype, block, backward=False)
    long = {} if why is None else {"mosaic_tpu": why}
    return long | attention_misfits(q, k, v) | block_misfits(block)


def ranked_misfits(q: jax.Array, k: jax.Array) -> dict[str, str]:
    """Which kernels cannot rank the block means k [b c k h] for q: {implementation: why}."""
    why = mosaic_memory.blocks_misfit(k.shape[1], k.dtype)
    many = {} if why is None else {"mosaic_tpu": why}
    return many | attention_misfits(q, k, k)
