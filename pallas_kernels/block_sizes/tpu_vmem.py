"""How many keys and blocks the TPU kernels over chosen blocks take: what they keep in VMEM.

Attention over chosen blocks holds the keys and values of one KV head, as many as fit, and passes
all queries over every such range of keys; its gradients hold theirs as well, in float32. The choice
of blocks holds the scores of one register of queries for all blocks.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import compat
from pallas_kernels.block_sizes import tpu
from pallas_kernels.block_sizes.tpu import LANES
from pallas_kernels.block_sparse.block_set import WORD

TILE_BYTES = 4 * 2**20  # tiles of queries, twice each, and what a step computes
MOST_RANGES = 8  # each is a pass over all queries, and a kernel to compile


def keys_per_range(dtype: DTypeLike, block: int, *, backward: bool) -> int:
    """The most keys of one KV head that are held at a time: whole blocks."""
    return _room() // _key_bytes(dtype, backward) // block * block


def keys_unsupported_reason(
    keys: int, dtype: DTypeLike, block: int, *, backward: bool
) -> str | None:
    """Why attention over chosen blocks cannot take so many keys; None if it can."""
    fit = keys_per_range(dtype, block, backward=backward)
    if keys <= MOST_RANGES * fit:
        return None
    held = "their gradients in float32" if backward else "no gradients"
    return (
        f"{keys} keys do not fit: the vector memory of {compat.device_kind()!r} has {_memory()}, "
        f"one of {LANES} values and {jnp.dtype(dtype).name} takes {_key_bytes(dtype, backward)} B "
        f"(key and value, {held}), so {fit} are held at a time and at most {MOST_RANGES} times as "
        f"many in turn; split the keys over {-(-keys // (MOST_RANGES * fit))} devices by context "
        f"parallelism, or use at most {MOST_RANGES * fit} keys or implementation='xla'"
    )


def blocks_unsupported_reason(count: int, dtype: DTypeLike) -> str | None:
    """Why so many blocks cannot be ranked; None if they can."""
    score, mean, bits = 4 * LANES, 2 * LANES * jnp.dtype(dtype).itemsize, 2 * 4 * LANES // WORD
    fit = _room() // (score + mean + bits)
    if count <= fit:
        return None
    return (
        f"{count} blocks do not fit: the vector memory of {compat.device_kind()!r} has "
        f"{_memory()}, one takes {score + mean + bits} B ({score} B for the scores of {LANES} "
        f"queries, {mean} B for its mean and {bits} B for bits, twice each); use at most {fit} "
        "blocks, or implementation='xla'"
    )


def _room():
    return tpu.pick(compat.device_kind()).vmem - TILE_BYTES


def _memory():
    return f"{_room() / 2**20:g} MiB beside {TILE_BYTES / 2**20:g} MiB for tiles"


def _key_bytes(dtype, backward):
    return 2 * LANES * (jnp.dtype(dtype).itemsize + (4 if backward else 0))
