"""The gradients of `selected_attention` on TPUs, in one pass over the unions of the forward pass.

A step recomputes the weights of some blocks once, for all three gradients. Those of the queries
stay in registers while a tile visits its blocks; those of keys and values are float32 sums in VMEM,
to which the tiles add in their order: no atomics, and two runs are equal.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes import tpu as block_sizes
from pallas_kernels.block_sizes.tpu import LANES
from pallas_kernels.compat import pl
from pallas_kernels.flash_attention import online_softmax
from pallas_kernels.selected_attention import mosaic_tpu_tiles as tile
from pallas_kernels.tpu_layout import column, flat, kept, product


def backward(residuals, dout, config):
    """See `AttentionKernels`; nothing of `dout` is read where a query sees nothing."""
    q, k, v, sees, out, lse = residuals
    b, s = q.shape[:2]
    t, heads = k.shape[1:3]
    dims = tile.TileDims.of(q, k, sees.blocks.block, backward=True)
    schedule = tile.BlockSchedule.plan(dims, sees, t)
    delta = online_softmax.row_products(dout, out)
    numbers = [tile.rows_of(x, dims, heads, fill) for x, fill in ((lse, -jnp.inf), (delta, 0))]
    tiles = -(-s // dims.block_q)
    queries, douts = (flat(x, tiles * dims.block_q) for x in (q, dout.astype(q.dtype)))
    keys, values = (flat(x, dims.ranges * dims.span) for x in (k, v))
    sums = jax.ShapeDtypeStruct((b, dims.span, heads * LANES), jnp.float32)
    dq, dkv = (), []
    for i in range(dims.ranges):
        lists, list_specs = schedule.inputs(dims, i)
        dtype = q.dtype if i + 1 == dims.ranges else jnp.float32
        results = compat.mosaic_call(
            functools.partial(
                _grad_tile, dims=dims, begin=i * dims.span // dims.block, scale=config.scale
            ),
            grid=(b, heads, tiles),
            in_specs=[
                *list_specs,
                *[tile.query_spec(dims)] * 2,
                *[tile.row_spec(dims)] * 2,
                *[tile.key_spec(dims, i)] * 2,
                *[tile.query_spec(dims) for _ in dq],
            ],
            out_specs=[tile.query_spec(dims), *[tile.key_spec(dims, 0)] * 2],
            out_shape=[jax.ShapeDtypeStruct(queries.shape, dtype), sums, sums],
            scratch_shapes=[schedule.scratch(dims)],
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=block_sizes.pick(compat.device_kind()).vmem,
            interpret=config.interpret,
            name="selected_attention_bwd",
        )(*lists, queries, douts, *numbers, keys, values, *dq)
        dq, dkv = results[:1], [*dkv, results[1:]]
    dk, dv = (jnp.concatenate(x, axis=1) for x in zip(*dkv, strict=True))
    dk, dv = ((x * y).astype(k.dtype) for x, y in ((dk, config.scale), (dv, 1.0)))
    return tile.unflat(dq[0], q.shape), tile.unflat(dk, k.shape), tile.unflat(dv, v.shape)


def _grad_tile(*refs, dims, begin, scale):
    """What one tile of one KV head adds to the gradients of a range of keys, and gets from it."""
    *schedule, q, dout, lse, delta, k, v = refs[:10]
    *before, dq, dk, dv, words = refs[10:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        def clear(i, _):
            place = pl.multiple_of(i * dims.block, dims.block)
            for ref in (dk, dv):
                ref[pl.ds(place, dims.block), :] = jnp.zeros((dims.block, LANES))

        jax.lax.fori_loop(0, dims.span // dims.block, clear, None)

    # A row that sees nothing may hold NaN, and every row enters the sums of the keys.
    live = column(lse[...], LANES) != -jnp.inf
    rows, douts = (kept(tile.load_rows(x, dims), live) for x in (q, dout))
    base, shift = lse[...], delta[...]

    def step(total, keys, values, see, places):
        logits = product(keys, rows, 1, 1) * scale
        weights = jnp.where(see, jnp.exp(logits - base), 0.0)
        dweights = product(values, douts, 1, 1)
        dlogits = jnp.where(see, weights * (dweights - shift), 0.0).astype(rows.dtype)
        dkeys = product(dlogits, rows, 1, 0)
        dvalues = product(weights.astype(rows.dtype), douts, 1, 0)
        for i, place in enumerate(places):
            here, own = pl.ds(place, dims.block), slice(i * dims.block, (i + 1) * dims.block)
            dk[here, :] += dkeys[own]
            dv[here, :] += dvalues[own]
        return total + product(dlogits, keys, 0, 0)

    total = tile.load_rows(before[0], dims) if before else jnp.zeros(rows.shape)
    total = tile.kv_loop(schedule, words, k, v, dims, begin, step, total)
    last = begin * dims.block + dims.span == dims.ranges * dims.span
    tile.store_rows(dq, total * scale if last else total, dims)
