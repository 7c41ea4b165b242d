"""The block choice of the released code: running best lists in a bitonic network of 64 elements.

The network is not stable: equal scores swap wherever the direction of sorting is downwards. Which
of several equal blocks is chosen follows from its exact order of comparisons, so it is done here
comparison by comparison. All queries with a zero vector tie over all their blocks.
"""

import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 64  # blocks looked at together; half of them survive
STAGES = 6


def network_top(scores: jax.Array, own: jax.Array, count: int) -> jax.Array:
    """The chosen blocks in the network's order.

    Blocks are looked at 64 at a time, and the best 32 of each 64 are kept; so above 32 the result
    is not the true top. Blocks after the query's own take part as empty entries of score 0, which
    may beat a block whose score is 0.

    Args:
      scores: f32[... c], not NaN.
      own: i32[...] the query's own block, the last that can be chosen; below 0 for none.
      count: blocks to choose, at most 64; the network rounds it up to a power of two.

    Returns:
      i32[... s], s the power of two; -1 is an empty entry.

    Raises:
      ValueError: count is above 64.
    """
    if count > WIDTH:
        raise ValueError(f"{count=} is above {WIDTH}, the width of the released top-k network")
    chunks = -(-scores.shape[-1] // WIDTH)
    pad = [(0, 0)] * (scores.ndim - 1) + [(0, chunks * WIDTH - scores.shape[-1])]
    scores = jnp.moveaxis(jnp.pad(scores, pad).reshape(*own.shape, chunks, WIDTH), -2, 0)
    blocks = jnp.arange(chunks * WIDTH, dtype=jnp.int32).reshape(chunks, WIDTH)

    def look(best, chunk):
        score, block = chunk
        open_ = block <= own[..., None]
        entries = jnp.where(open_, score, 0.0), jnp.where(open_, block, -1)
        for stage in range(1, STAGES):
            entries = _merge(entries, stage, _alternating(stage))
        rising = _merge(entries, STAGES, np.zeros(WIDTH, bool))
        half = np.arange(WIDTH) < WIDTH // 2
        both = tuple(jnp.where(half, x, y) for x, y in zip(best, rising, strict=True))
        falling = np.ones(WIDTH, bool)
        first = block[0] == 0
        both = tuple(jnp.where(first, x, y) for x, y in zip(entries, both, strict=True))
        better = _merge(both, STAGES, falling)
        reached = (block[0] <= own)[..., None]
        return tuple(jnp.where(reached, x, y) for x, y in zip(better, best, strict=True)), None

    shape = (*own.shape, WIDTH)
    empty = jnp.zeros(shape, scores.dtype), jnp.full(shape, -1, jnp.int32)
    (_, chosen), _ = jax.lax.scan(look, empty, (scores, blocks))
    return chosen[..., : 1 << (count - 1).bit_length()]


def _alternating(stage: int) -> np.ndarray:
    """bool[64]: runs of 2^stage elements are sorted upwards and downwards in turns."""
    return (np.arange(WIDTH) >> stage) & 1 == 1


def _merge(entries: tuple, stage: int, down: np.ndarray) -> tuple:
    """Bitonic runs of 2^stage of (scores, blocks) [... 64] -> sorted; `down` bool[64]."""
    for stride in (1 << s for s in reversed(range(stage))):
        shape = (WIDTH // (2 * stride), 2, stride)
        down_here = down.reshape(shape)[:, 0]
        score = entries[0].reshape(*entries[0].shape[:-1], *shape)
        swap = (score[..., 0, :] > score[..., 1, :]) ^ down_here
        entries = tuple(_swap(x, swap, shape) for x in entries)
    return entries


def _swap(x: jax.Array, swap: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    pairs = x.reshape(*x.shape[:-1], *shape)
    left, right = pairs[..., 0, :], pairs[..., 1, :]
    swapped = [jnp.where(swap, right, left), jnp.where(swap, left, right)]
    return jnp.stack(swapped, axis=-2).reshape(x.shape)
