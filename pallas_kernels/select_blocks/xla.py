"""`select_blocks` by tiles of queries: the scores of one tile exist at a time."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse.block_set import BlockSet, pack
from pallas_kernels.flash_attention import online_softmax as tile_math
from pallas_kernels.flash_attention.xla_tiles import Cut, Sight, Tiles, Walk

TILES = Tiles(rows=2048, block=128)


def select_blocks(q, k, lse, visible, own, *, rule, scale):
    """See `api.py`."""
    cut = Cut(q.shape, k.shape, TILES)
    sight = Sight(visible[..., 0], visible[..., 1])

    def lane(args):
        rows, lse, own, keys, (queries, key_pos) = args

        def tile(args):
            rows, lse, own, queries = args
            walk = Walk.plan(queries, key_pos, cut.fetch)
            scores = _scores(rows, lse, keys, walk, scale)
            return pack(_choose(scores[:, : k.shape[1]], queries[0], own, rule))

        return jax.lax.map(tile, (rows, lse, own, queries))

    lanes = cut.rows(q), cut.rows(lse), cut.each_query(own), cut.keys(k), cut.sights(sight)
    return BlockSet(cut.join_each_query(jax.lax.map(lane, lanes)), rule.block)


def _scores(q, lse, keys, walk, scale):
    """Softmax weights summed over heads: rows float[m h], keys [c w h] -> f32[queries c*w]."""
    base = tile_math.finite(lse)

    def step(i, scores):
        ids, see = walk.step(i)
        logits = tile_math.product(tile_math.fetch(keys, ids), q, 1, 1) * scale
        weights = jnp.exp(tile_math.mask(logits - base, see.T, axis=1))
        weights = weights.reshape(weights.shape[0], -1, see.shape[0]).sum(1)
        return tile_math.add(scores, ids, weights)

    zeros = jnp.zeros((*keys.shape[:2], walk.lo.shape[0]))
    return jax.lax.fori_loop(0, walk.steps, step, zeros).reshape(-1, zeros.shape[-1]).T


def _choose(scores, first, own, rule):
    """Scores f32[queries c] -> members bool[queries c], by the rule's forced blocks and top."""
    first, own = first[:, None], own[:, None]
    j = jnp.arange(scores.shape[1])
    forced = (j < first + rule.first) | (j > own - rule.local)
    candidate = (first <= j) & (j <= own)
    return _top(jnp.where(candidate, jnp.where(forced, jnp.inf, scores), -1.0), rule.top)


def _top(scores, count):
    """Members of `jax.lax.top_k` as a mask [.. c]; negative scores are never members."""
    if scores.shape[-1] <= count:
        return scores >= 0
    best, index = jax.lax.top_k(scores, count)
    # Not best[..., -1:]: XLA turns a sliced top_k into a full sort.
    least = best.min(-1, keepdims=True)
    # top_k takes the lowest indices among equals, so its last index ends the ties it took.
    last = jnp.where(best == least, index, -1).max(-1, keepdims=True)
    j = jnp.arange(scores.shape[-1])
    return (scores >= 0) & ((scores > least) | ((scores == least) & (j <= last)))
