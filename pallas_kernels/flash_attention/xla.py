"""Attention under a `KeyRangeMask` in plain JAX, memory linear in both lengths.

The branches of native sparse attention, dense attention and the windows of a vision tower are one
computation: a tile of queries visits an ascending list of key blocks, keeps softmax statistics, and
masks the keys that a single query does not see. They differ in their mask and sizes only. The
backward pass visits the same lists and recomputes the weights from the saved lse.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sizes import xla as sizes
from pallas_kernels.flash_attention import online_softmax
from pallas_kernels.flash_attention.attention_kernels import AttentionKernels
from pallas_kernels.flash_attention.xla_tiles import KVLoop, TileLayout


def forward(q, k, v, mask, config):
    """See `AttentionKernels`."""
    layout = _layout(q, k, mask, config)

    def head(args):
        rows, keys, values, (queries, key_pos) = args

        def tile(args):
            rows, queries = args
            kv_loop = KVLoop.plan(queries, key_pos, layout.blocks_per_step)
            return _tile_forward(rows, keys, values, kv_loop, config.scale)

        return jax.lax.map(tile, (rows, queries))

    heads = (
        layout.rows(mask.zero_blind(q)),
        layout.keys(k),
        layout.keys(v),
        layout.masks(mask),
    )
    out, lse = (layout.join_rows(x) for x in jax.lax.map(head, heads))
    return out.astype(q.dtype), lse


def backward(residuals, dout, config):
    """See `AttentionKernels`."""
    q, k, v, mask, out, lse = residuals
    layout = _layout(q, k, mask, config)
    delta = online_softmax.row_products(dout, out)

    def head(args):
        rows, keys, values, (queries, key_pos) = args

        def tile(grads, args):
            rows, queries = args
            kv_loop = KVLoop.plan(queries, key_pos, layout.blocks_per_step)
            return _tile_backward(rows, keys, values, grads, kv_loop, config.scale)

        zeros = jnp.zeros(keys.shape, jnp.float32)
        (dk, dv), dq = jax.lax.scan(tile, (zeros, zeros), (rows, queries))
        return dq, dk, dv

    rows = tuple(layout.rows(x) for x in (mask.zero_blind(q), dout, lse, delta))
    heads = rows, layout.keys(k), layout.keys(v), layout.masks(mask)
    dq, dk, dv = jax.lax.map(head, heads)
    dq, dk, dv = layout.join_rows(dq), layout.join_keys(dk), layout.join_keys(dv)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


KERNELS = AttentionKernels(forward, backward)


def _layout(q, k, mask, config):
    group = q.shape[2] // k.shape[2]
    return TileLayout(q.shape, k.shape, sizes.pick(config, group, mask.block))


def _tile_forward(q, keys, values, kv_loop, scale):
    """One tile: rows float[m h] over blocks float[c w h] -> out f32[m h], lse f32[m]."""
    rows, h = q.shape

    def step(i, state):
        m, l, o = state
        ids, see = kv_loop.step(i)
        logits = online_softmax.product(q, online_softmax.fetch(keys, ids), 1, 1) * scale
        logits = online_softmax.mask(logits, see, axis=0)
        new_m = jnp.maximum(m, logits.max(1))
        base = online_softmax.finite(new_m)
        weights = jnp.exp(logits - base[:, None])
        alpha = jnp.exp(m - base)
        v = online_softmax.seen(online_softmax.fetch(values, ids), see)
        o = o * alpha[:, None] + online_softmax.product(weights.astype(v.dtype), v, 1, 0)
        return new_m, l * alpha + weights.sum(1), o

    state = jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((rows, h))
    m, l, o = jax.lax.fori_loop(0, kv_loop.steps, step, state)
    safe = jnp.where(l == 0, 1.0, l)
    return o / safe[:, None], jnp.where(l == 0, -jnp.inf, m + jnp.log(safe))


def _tile_backward(rows, keys, values, grads, kv_loop, scale):
    """One tile: adds to the gradients (dk, dv), each f32[c w h] -> (them, dq f32[m h]).

    Weights are held with keys on rows, [t m]: two of the three products that follow then contract
    their last axis, which a CPU multiplies fastest.
    """
    q, dout, lse, delta = rows
    base = online_softmax.finite(lse)

    def step(i, state):
        dq, dk, dv = state
        ids, see = kv_loop.step(i)
        k, v = (online_softmax.seen(online_softmax.fetch(x, ids), see) for x in (keys, values))
        weights = jnp.exp(
            online_softmax.mask(online_softmax.product(k, q, 1, 1) * scale - base, see.T, axis=1)
        )
        dlogits = weights * (online_softmax.product(v, dout, 1, 1) - delta) * scale
        weights, dlogits = weights.astype(q.dtype), dlogits.astype(q.dtype)
        dq = dq + online_softmax.product(dlogits, k, 0, 0)
        dk = online_softmax.add(dk, ids, online_softmax.product(dlogits, q, 1, 0))
        dv = online_softmax.add(dv, ids, online_softmax.product(weights, dout, 1, 0))
        return dq, dk, dv

    dq, dk, dv = jax.lax.fori_loop(0, kv_loop.steps, step, (jnp.zeros(q.shape), *grads))
    return (dk, dv), dq
