"""Reference of `select_blocks`."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse.block_set import BlockSet, pack
from pallas_kernels.reference import EXACT


def select_blocks(q, k, lse, visible, own, *, rule, scale):
    """Scores of all pairs, then `jax.lax.top_k`."""
    b, s, n, h = q.shape
    _, c, heads, _ = k.shape
    j = jnp.arange(c)
    first = visible[..., :1]
    seen = (first <= j) & (j < visible[..., 1:])  # [b s c]
    grouped = q.astype(jnp.float32).reshape(b, s, heads, n // heads, h)
    logits = jnp.einsum("bskgh,bckh->bskgc", grouped, k.astype(jnp.float32), precision=EXACT)
    logits = jnp.where(seen[:, :, None, None], logits * scale, -jnp.inf)
    floor = jnp.where(jnp.isneginf(lse), 0.0, lse).reshape(b, s, heads, n // heads, 1)
    scores = jnp.exp(logits - floor).sum(3)  # [b s k c]

    candidate = (first <= j) & (j <= own[..., None])
    forced = candidate & (
        (j < first + rule.num_init_blocks) | (j > own[..., None] - rule.num_local_blocks)
    )
    scores = jnp.where(forced[:, :, None], jnp.inf, scores)
    scores = jnp.where(candidate[:, :, None], scores, -1.0)
    best, index = jax.lax.top_k(scores, min(rule.top_k, c))
    chosen = (jax.nn.one_hot(index, c) * (best >= 0)[..., None]).sum(-2) > 0
    return BlockSet(pack(chosen), rule.block)
