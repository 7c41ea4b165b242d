"""Attention under a `Sight` in plain JAX, memory linear in both lengths.

The branches of native sparse attention, dense attention and the windows of a vision tower are one
computation: a tile of queries walks an ascending list of key blocks, keeps softmax statistics, and
masks the keys that a single query does not see. They differ in their `Sight` and `Tiles` only. The
backward pass walks the same lists and recomputes the weights from the saved lse.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.schedule import Cut, Walk


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
            walk = Walk.plan(queries, key_pos, cut.tiles.fetch)
            return _forward(rows, keys, values, walk, scale)

        return jax.lax.map(tile, (rows, queries))

    lanes = cut.rows(sight.live(q)), cut.keys(k), cut.keys(v), cut.sights(sight)
    out, lse = (cut.join_rows(x) for x in cut.over_lanes(lane, lanes))
    out = out.astype(q.dtype)
    return (out, lse), (q, k, v, sight, out, lse)


def _attend_bwd(scale, tiles, residuals, cotangents):
    q, k, v, sight, out, lse = residuals
    cut = Cut(q.shape, k.shape, tiles)
    dout = sight.live(cotangents[0])
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def lane(args):
        rows, keys, values, (queries, key_pos) = args

        def tile(grads, args):
            rows, queries = args
            walk = Walk.plan(queries, key_pos, cut.tiles.fetch)
            return _backward(rows, keys, values, grads, walk, scale)

        zeros = jnp.zeros(keys.shape, jnp.float32)
        (dk, dv), dq = jax.lax.scan(tile, (zeros, zeros), (rows, queries))
        return dq, dk, dv

    rows = tuple(cut.rows(x) for x in (sight.live(q), dout, lse, delta))
    dq, dk, dv = cut.over_lanes(lane, (rows, cut.keys(k), cut.keys(v), cut.sights(sight)))
    dq, dk, dv = cut.join_rows(dq), cut.join_keys(dk), cut.join_keys(dv)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(q, keys, values, walk, scale):
    """One tile: rows float[m h] over blocks float[c w h] -> out f32[m h], lse f32[m]."""
    m, h = q.shape

    def step(i, state):
        top, total, acc = state
        ids, see = walk.step(i)
        logits = _mask(_product(q, _fetch(keys, ids), 1, 1) * scale, see)
        new_top = jnp.maximum(top, logits.max(1))
        base = _finite(new_top)
        weights = jnp.exp(logits - base[:, None])
        decay = jnp.exp(top - base)
        v = _seen(_fetch(values, ids), see)
        acc = acc * decay[:, None] + _product(weights.astype(v.dtype), v, 1, 0)
        return new_top, total * decay + weights.sum(1), acc

    state = jnp.full(m, -jnp.inf), jnp.zeros(m), jnp.zeros((m, h))
    top, total, acc = jax.lax.fori_loop(0, walk.steps, step, state)
    safe = jnp.where(total == 0, 1.0, total)
    return acc / safe[:, None], jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))


def _backward(rows, keys, values, grads, walk, scale):
    """One tile: adds to the gradients (dk, dv), each f32[c w h] -> (them, dq f32[m h])."""
    q, dout, lse, delta = rows
    base = _finite(lse)[:, None]

    def step(i, state):
        dq, dk, dv = state
        ids, see = walk.step(i)
        k, v = (_seen(_fetch(x, ids), see) for x in (keys, values))
        weights = jnp.exp(_mask(_product(q, k, 1, 1) * scale - base, see))
        dlogits = weights * (_product(dout, v, 1, 1) - delta[:, None]) * scale
        weights, dlogits = weights.astype(q.dtype), dlogits.astype(q.dtype)
        dq = dq + _product(dlogits, k, 1, 0)
        dk = _add(dk, ids, _product(dlogits, q, 0, 0))
        dv = _add(dv, ids, _product(weights, dout, 0, 0))
        return dq, dk, dv

    dq, dk, dv = jax.lax.fori_loop(0, walk.steps, step, (jnp.zeros(q.shape), *grads))
    return (dk, dv), dq


def _product(x, y, x_axis, y_axis):
    """Matrix product over one axis of each, accumulated in float32."""
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _finite(lse):
    """0 in place of -inf, so that exp(-inf - lse) is 0 and not NaN."""
    return jnp.where(jnp.isneginf(lse), 0.0, lse)


def _fetch(blocks, ids):
    """Blocks [c w h] -> the keys [fetch*w h] of blocks `ids`; None: all of them."""
    if ids is not None:
        blocks = blocks.at[ids].get(mode="promise_in_bounds")
    return blocks.reshape(-1, blocks.shape[-1])


def _add(blocks, ids, update):
    """The transpose of `_fetch`: adds keys [fetch*w h] to blocks `ids`."""
    update = update.reshape(-1, *blocks.shape[1:])
    return blocks + update if ids is None else blocks.at[ids].add(update, mode="promise_in_bounds")


def _mask(logits, see):
    """-inf where a query does not see a key: logits [queries*g t], see [queries t]."""
    grouped = logits.reshape(see.shape[0], -1, see.shape[1])
    return jnp.where(see[:, None], grouped, -jnp.inf).reshape(logits.shape)


def _seen(keys, see):
    """Zeros keys [t h] that no query of the tile sees: 0 x NaN must not enter a product."""
    return jnp.where(see.any(0)[:, None], keys, 0)
