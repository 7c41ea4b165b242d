"""Attention under a `Sight` in plain JAX, memory linear in both lengths.

The branches of native sparse attention, dense attention and the windows of a vision tower are one
computation: a tile of queries walks an ascending list of key blocks, keeps softmax statistics, and
masks the keys that a single query does not see. They differ in their `Sight` and `Tiles` only. The
backward pass walks the same lists and recomputes the weights from the saved lse.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import online_softmax as tile_math
from pallas_kernels.flash_attention.xla_tiles import Cut, Walk


@functools.partial(jax.custom_vjp, nondiff_argnames=("scale", "tiles"))
def attend(q, k, v, sight, scale, tiles):
    """Softmax attention of each query over the keys it sees.

    Args:
      q: float[b s n h] queries; query head i reads KV head i // (n // k).
      k: float[b t k h] keys.
      v: float[b t k h] values.
      sight: what each query sees.
      scale: factor of the logits.
      tiles: how to cut the work.

    Returns:
      out float[b s n h], dtype of `q`, and lse float32[b s n], the logarithm of the softmax
      denominator, which carries no gradient; 0 and -inf for a query that sees nothing.
    """
    return _attend_fwd(q, k, v, sight, scale, tiles)[0]


def _attend_fwd(q, k, v, sight, scale, tiles):
    cut = Cut(q.shape, k.shape, tiles)

    def lane(args):
        rows, keys, values, (queries, key_pos) = args

        def tile(args):
            rows, queries = args
            walk = Walk.plan(queries, key_pos, cut.fetch)
            return _forward(rows, keys, values, walk, scale)

        return jax.lax.map(tile, (rows, queries))

    lanes = cut.rows(sight.live(q)), cut.keys(k), cut.keys(v), cut.sights(sight)
    out, lse = (cut.join_rows(x) for x in jax.lax.map(lane, lanes))
    out = out.astype(q.dtype)
    return (out, lse), (q, k, v, sight, out, lse)


def _attend_bwd(scale, tiles, residuals, cotangents):
    return *backward(residuals, cotangents[0], scale, tiles), None


attend.defvjp(_attend_fwd, _attend_bwd)


def backward(residuals, dout, scale, tiles):
    """The gradients of `attend`, whatever computed its results.

    Args:
      residuals: q, k, v and sight as `attend` takes them, out and lse as it returns them.
      dout: float[b s n h] gradient of `out`.
      scale: factor of the logits.
      tiles: how to cut the work.

    Returns:
      dq, dk, dv in the shapes and dtypes of q, k, v.
    """
    q, k, v, sight, out, lse = residuals
    cut = Cut(q.shape, k.shape, tiles)
    delta = tile_math.row_products(dout, out)

    def lane(args):
        rows, keys, values, (queries, key_pos) = args

        def tile(grads, args):
            rows, queries = args
            walk = Walk.plan(queries, key_pos, cut.fetch)
            return _backward(rows, keys, values, grads, walk, scale)

        zeros = jnp.zeros(keys.shape, jnp.float32)
        (dk, dv), dq = jax.lax.scan(tile, (zeros, zeros), (rows, queries))
        return dq, dk, dv

    rows = tuple(cut.rows(x) for x in (sight.live(q), dout, lse, delta))
    dq, dk, dv = jax.lax.map(lane, (rows, cut.keys(k), cut.keys(v), cut.sights(sight)))
    dq, dk, dv = cut.join_rows(dq), cut.join_keys(dk), cut.join_keys(dv)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _forward(q, keys, values, walk, scale):
    """One tile: rows float[m h] over blocks float[c w h] -> out f32[m h], lse f32[m]."""
    m, h = q.shape

    def step(i, state):
        top, total, acc = state
        ids, see = walk.step(i)
        logits = tile_math.product(q, tile_math.fetch(keys, ids), 1, 1) * scale
        logits = tile_math.mask(logits, see, axis=0)
        new_top = jnp.maximum(top, logits.max(1))
        base = tile_math.finite(new_top)
        weights = jnp.exp(logits - base[:, None])
        decay = jnp.exp(top - base)
        v = tile_math.seen(tile_math.fetch(values, ids), see)
        acc = acc * decay[:, None] + tile_math.product(weights.astype(v.dtype), v, 1, 0)
        return new_top, total * decay + weights.sum(1), acc

    state = jnp.full(m, -jnp.inf), jnp.zeros(m), jnp.zeros((m, h))
    top, total, acc = jax.lax.fori_loop(0, walk.steps, step, state)
    safe = jnp.where(total == 0, 1.0, total)
    return acc / safe[:, None], jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))


def _backward(rows, keys, values, grads, walk, scale):
    """One tile: adds to the gradients (dk, dv), each f32[c w h] -> (them, dq f32[m h]).

    Weights are held with keys on rows, [t m]: two of the three products that follow then contract
    their last axis, which a CPU multiplies fastest.
    """
    q, dout, lse, delta = rows
    base = tile_math.finite(lse)

    def step(i, state):
        dq, dk, dv = state
        ids, see = walk.step(i)
        k, v = (tile_math.seen(tile_math.fetch(x, ids), see) for x in (keys, values))
        weights = jnp.exp(
            tile_math.mask(tile_math.product(k, q, 1, 1) * scale - base, see.T, axis=1)
        )
        dlogits = weights * (tile_math.product(v, dout, 1, 1) - delta) * scale
        weights, dlogits = weights.astype(q.dtype), dlogits.astype(q.dtype)
        dq = dq + tile_math.product(dlogits, k, 0, 0)
        dk = tile_math.add(dk, ids, tile_math.product(dlogits, q, 1, 0))
        dv = tile_math.add(dv, ids, tile_math.product(weights, dout, 1, 0))
        return dq, dk, dv

    dq, dk, dv = jax.lax.fori_loop(0, walk.steps, step, (jnp.zeros(q.shape), *grads))
    return (dk, dv), dq
