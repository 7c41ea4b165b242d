"""Heads of a group as queries: where queries are few, their rows fill a tile together."""

import jax.numpy as jnp


def pack_gqa(q, heads):
    """[b s n h] queries of `heads` KV heads -> [b s*g heads h], the g of a query adjacent."""
    b, s, n, h = q.shape
    return jnp.swapaxes(q.reshape(b, s, heads, n // heads, h), 2, 3).reshape(b, -1, heads, h)


def unpack_gqa(out, lse, shape):
    """Results [b s*g heads h] and [b s*g heads] of packed queries -> those of q [b s n h]."""
    b, s, n, _ = shape
    heads = lse.shape[2]
    out, lse = (jnp.swapaxes(x.reshape(b, s, n // heads, heads, -1), 2, 3) for x in (out, lse))
    return out.reshape(shape), lse.reshape(b, s, n)
