"""The block choice of the released code: running best lists in a bitonic network of 64 elements.

The network is not stable: equal scores swap wherever the direction of sorting is downwards. Which
of several equal blocks is chosen follows from its exact order of comparisons, so it is done here
comparison by comparison. All queries with a zero vector tie over all their blocks.
"""

import jax
import jax.numpy as jnp
import numpy as np

from videonsa_jax.config.schema import RELEASED_TOPK

WIDTH = RELEASED_TOPK  # blocks looked at together; half of them survive
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
        entries = _run(entries, _SORT)
        # The first 64 have nothing to meet; later ones meet the best so far, half against half.
        first, half = block[0] == 0, np.arange(WIDTH) < WIDTH // 2
        rising = _run(entries, _RISE)
        met = (jnp.where(half, x, y) for x, y in zip(best, rising, strict=True))
        met = (jnp.where(first, x, y) for x, y in zip(entries, met, strict=True))
        better = _run(tuple(met), _FALL)
        reached = (block[0] <= own)[..., None]
        return tuple(jnp.where(reached, x, y) for x, y in zip(better, best, strict=True)), None

    shape = (*own.shape, WIDTH)
    empty = jnp.zeros(shape, scores.dtype), jnp.full(shape, -1, jnp.int32)
    (_, chosen), _ = jax.lax.scan(look, empty, (scores, blocks))
    return chosen[..., : 1 << (count - 1).bit_length()]


def _run(entries: tuple[jax.Array, ...], steps: tuple[np.ndarray, ...]) -> tuple[jax.Array, ...]:
    """Compares and swaps (scores, blocks) [... 64], step after step."""

    def step(entries, tables):
        partner, is_left, down = tables
        others = tuple(x[..., partner] for x in entries)
        mine, other = entries[0], others[0]
        swap = jnp.where(is_left, mine > other, other > mine) ^ down
        return tuple(jnp.where(swap, y, x) for x, y in zip(entries, others, strict=True)), None

    return jax.lax.scan(step, entries, tuple(map(jnp.asarray, steps)))[0]


def _merge(stage: int, down: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    """Steps that sort bitonic runs of 2^stage elements, downwards where `down` bool[64].

    A step is, per element: its partner, whether it is the left of the two, and the direction.
    """
    element = np.arange(WIDTH)
    strides = [1 << s for s in reversed(range(stage))]
    return [(element ^ stride, element & stride == 0, down) for stride in strides]


def _tables(steps: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    return tuple(np.stack(table) for table in zip(*steps, strict=True))


def _alternating(stage: int) -> np.ndarray:
    """bool[64]: runs of 2^stage elements are sorted upwards and downwards in turns."""
    return (np.arange(WIDTH) >> stage) & 1 == 1


_SORT = _tables([x for stage in range(1, STAGES) for x in _merge(stage, _alternating(stage))])
_RISE = _tables(_merge(STAGES, np.zeros(WIDTH, bool)))
_FALL = _tables(_merge(STAGES, np.ones(WIDTH, bool)))
