"""`select_blocks` by tiles of queries: scores of one tile at a time."""

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import BlockSet, pack
from pallas_kernels.schedule import Cut, Tiles

TILES = Tiles(queries=64, block=1)


def select_blocks(q, k, lse, visible, own, *, rule, scale):
    """See `api.py`."""
    cut = Cut(q.shape, k.shape, TILES)
    ranges = tuple(cut.queries(x) for x in (visible[..., 0], visible[..., 1], own))
    lanes = cut.rows(q), cut.rows(lse), cut.keys(k), ranges

    def lane(args):
        rows, lse, keys, ranges = args
        return jax.lax.map(
            lambda tile: _choose(*tile, keys[:, 0], rule, scale), (rows, lse, ranges)
        )

    bits = cut.over_lanes(lane, lanes)  # [lanes tiles queries words]
    return BlockSet(cut.join_queries(bits), rule.block)


def _choose(q, lse, ranges, keys, rule, scale):
    """Rows float[m h], lse f32[m] of one tile, keys float[c h] -> uint32[queries words]."""
    first, seen_end, own = (x[:, None] for x in ranges)
    j = jnp.arange(keys.shape[0])
    seen = (first <= j) & (j < seen_end)
    logits = jnp.einsum(
        "mh,ch->mc",
        q,
        keys,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    weights = jnp.exp(logits * scale - jnp.where(jnp.isneginf(lse), 0.0, lse)[:, None])
    scores = weights.reshape(first.shape[0], -1, keys.shape[0]).sum(1)
    candidate = (first <= j) & (j <= own)
    forced = (j < first + rule.first) | (j > own - rule.local)
    scores = jnp.where(forced, jnp.inf, jnp.where(seen, scores, 0.0))
    return pack(_top(jnp.where(candidate, scores, -1.0), rule.top))


def _top(scores, count):
    """Members of `jax.lax.top_k` as a mask [.. c]; negative scores are never members."""
    if scores.shape[-1] <= count:
        return scores >= 0
    best, index = jax.lax.top_k(scores, count)
    least, last = best[..., -1:], index[..., -1:]
    # top_k takes the lowest indices among equals, so its last index ends the ties it took.
    j = jnp.arange(scores.shape[-1])
    return (scores >= 0) & ((scores > least) | ((scores == least) & (j <= last)))
