"""`select_blocks` by tiles of queries: the scores of one tile exist at a time."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sizes import xla as sizes
from pallas_kernels.block_sparse.block_set import BlockSet, pack
from pallas_kernels.flash_attention import online_softmax
from pallas_kernels.flash_attention.mask import KeyRangeMask
from pallas_kernels.flash_attention.xla_tiles import KVLoop, TileLayout


def select_blocks(q, k, lse, visible, own, rule, config):
    """See `Backend.select`."""
    layout = TileLayout(q.shape, k.shape, sizes.RANKED)
    mask = KeyRangeMask.of_ranges(visible)

    def head(args):
        rows, lse, own, keys, (queries, key_pos) = args

        def tile(args):
            rows, lse, own, queries = args
            kv_loop = KVLoop.plan(queries, key_pos, layout.blocks_per_step)
            scores = _scores(rows, lse, keys, kv_loop, config.scale)
            return pack(_choose(scores[:, : k.shape[1]], queries[0], own, rule))

        return jax.lax.map(tile, (rows, lse, own, queries))

    heads = (
        layout.rows(q),
        layout.rows(lse),
        layout.each_query(own),
        layout.keys(k),
        layout.masks(mask),
    )
    return BlockSet(layout.join_each_query(jax.lax.map(head, heads)), rule.block)


def _scores(q, lse, keys, kv_loop, scale):
    """Softmax weights summed over heads: rows float[m h], keys [c w h] -> f32[queries c*w]."""
    base = online_softmax.finite(lse)

    def step(i, scores):
        ids, see = kv_loop.step(i)
        logits = online_softmax.product(online_softmax.fetch(keys, ids), q, 1, 1) * scale
        weights = jnp.exp(online_softmax.mask(logits - base, see.T, axis=1))
        weights = weights.reshape(weights.shape[0], -1, see.shape[0]).sum(1)
        return online_softmax.add(scores, ids, weights)

    zeros = jnp.zeros((*keys.shape[:2], kv_loop.lo.shape[0]))
    return jax.lax.fori_loop(0, kv_loop.steps, step, zeros).reshape(-1, zeros.shape[-1]).T


def _choose(scores, first, own, rule):
    """Scores f32[queries c] -> members bool[queries c], by the rule's forced blocks and top."""
    first, own = first[:, None], own[:, None]
    j = jnp.arange(scores.shape[1])
    forced = (j < first + rule.num_init_blocks) | (j > own - rule.num_local_blocks)
    candidate = (first <= j) & (j <= own)
    return _top(jnp.where(candidate, jnp.where(forced, jnp.inf, scores), -1.0), rule.top_k)


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
