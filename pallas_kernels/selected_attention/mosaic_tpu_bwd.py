"""The gradients of `selected_attention` on TPUs, in one pass over the unions of the forward pass.

A step recomputes the weights of some blocks once, for all three gradients. Those of the queries
stay in registers while a tile walks; those of keys and values are float32 sums in VMEM, to which
the tiles add in their order: no atomics, and two runs are equal.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes import tpu as tpu_sizes
from pallas_kernels.block_sizes.tpu import LANES
from pallas_kernels.compat import pl
from pallas_kernels.flash_attention import online_softmax as tile_math
from pallas_kernels.flash_attention.mosaic_tpu_pipeline import column, flat, kept, product
from pallas_kernels.selected_attention import mosaic_tpu_tiles as tile


def backward(residuals, dout, *, scale, interpret):
    """dq, dk, dv in the shapes and dtypes of q, k, v.

    Args:
      residuals: q, k, v, blocks and pos as in `api.py`, then out float[b s n h] and its
        lse float32[b s n], -inf where a query sees nothing.
      dout: float[b s n h] gradient of `out`; nothing is read where a query sees nothing.
      scale: factor of the logits.
      interpret: run in the interpreter.
    """
    q, k, v, blocks, pos, out, lse = residuals
    b, s = q.shape[:2]
    t, heads = k.shape[1:3]
    cut = tile.Cut.of(q, k, blocks.block, backward=True)
    schedule = tile.Schedule.plan(cut, blocks, pos, t)
    delta = tile_math.row_products(dout, out)
    numbers = [tile.rows_of(x, cut, heads, fill) for x, fill in ((lse, -jnp.inf), (delta, 0))]
    tiles = -(-s // cut.queries)
    queries, douts = (flat(x, tiles * cut.queries) for x in (q, dout.astype(q.dtype)))
    keys, values = (flat(x, cut.ranges * cut.span) for x in (k, v))
    sums = jax.ShapeDtypeStruct((b, cut.span, heads * LANES), jnp.float32)
    dq, dkv = (), []
    for i in range(cut.ranges):
        lists, list_specs = schedule.inputs(cut, i)
        dtype = q.dtype if i + 1 == cut.ranges else jnp.float32
        results = compat.mosaic_call(
            functools.partial(_grad_tile, cut=cut, begin=i * cut.span // cut.block, scale=scale),
            grid=(b, heads, tiles),
            in_specs=[
                *list_specs,
                *[tile.query_spec(cut)] * 2,
                *[tile.row_spec(cut)] * 2,
                *[tile.key_spec(cut, i)] * 2,
                *[tile.query_spec(cut) for _ in dq],
            ],
            out_specs=[tile.query_spec(cut), *[tile.key_spec(cut, 0)] * 2],
            out_shape=[jax.ShapeDtypeStruct(queries.shape, dtype), sums, sums],
            scratch_shapes=[schedule.scratch(cut)],
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tpu_sizes.pick(compat.device_kind()).vmem,
            interpret=interpret,
            name="selected_attention_bwd",
        )(*lists, queries, douts, *numbers, keys, values, *dq)
        dq, dkv = results[:1], [*dkv, results[1:]]
    dk, dv = (jnp.concatenate(x, axis=1) for x in zip(*dkv, strict=True))
    dk, dv = ((x * y).astype(k.dtype) for x, y in ((dk, scale), (dv, 1.0)))
    return tile.unflat(dq[0], q.shape), tile.unflat(dk, k.shape), tile.unflat(dv, v.shape)


def _grad_tile(*refs, cut, begin, scale):
    """What one tile of one KV head adds to the gradients of a range of keys, and gets from it."""
    *schedule, q, dout, lse, delta, k, v = refs[:10]
    *before, dq, dk, dv, words = refs[10:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        def clear(i, _):
            place = pl.multiple_of(i * cut.block, cut.block)
            for ref in (dk, dv):
                ref[pl.ds(place, cut.block), :] = jnp.zeros((cut.block, LANES))

        jax.lax.fori_loop(0, cut.span // cut.block, clear, None)

    # A row that sees nothing may hold NaN, and every row enters the sums of the keys.
    live = column(lse[...], LANES) != -jnp.inf
    rows, douts = (kept(tile.load_rows(x, cut), live) for x in (q, dout))
    base, shift = lse[...], delta[...]

    def step(total, keys, values, see, places):
        logits = product(keys, rows, 1, 1) * scale
        weights = jnp.where(see, jnp.exp(logits - base), 0.0)
        dweights = product(values, douts, 1, 1)
        dlogits = jnp.where(see, weights * (dweights - shift), 0.0).astype(rows.dtype)
        dkeys = product(dlogits, rows, 1, 0)
        dvalues = product(weights.astype(rows.dtype), douts, 1, 0)
        for i, place in enumerate(places):
            here, part = pl.ds(place, cut.block), slice(i * cut.block, (i + 1) * cut.block)
            dk[here, :] += dkeys[part]
            dv[here, :] += dvalues[part]
        return total + product(dlogits, keys, 0, 0)

    total = tile.load_rows(before[0], cut) if before else jnp.zeros(rows.shape)
    total = tile.walk(schedule, words, k, v, cut, begin, step, total)
    last = begin * cut.block + cut.span == cut.ranges * cut.span
    tile.store_rows(dq, total * scale if last else total, cut)
