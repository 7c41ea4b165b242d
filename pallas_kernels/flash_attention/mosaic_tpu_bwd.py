"""The gradients of `mosaic_tpu.forward`, by two kernels that recompute the weights from lse.

One takes a tile of queries with all heads of a group over the key tiles of the forward pass, for
dq. The other takes a tile of keys over the tiles of queries that see it, for dk and dv. Sums are
taken in a fixed order.

A query that sees nothing is dropped; what it holds, and its dout, may be NaN. What is not finite in
the dout of another query stays visible in the gradients.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes.tpu import LANES
from pallas_kernels.compat import pl, pltpu
from pallas_kernels.flash_attention import online_softmax
from pallas_kernels.flash_attention.mosaic_tpu_pipeline import (
    BUFFERS,
    PipelineDims,
    key_streams,
    schedule_inputs,
    tile_loop,
)
from pallas_kernels.flash_attention.tile_schedule import TileSchedule
from pallas_kernels.tpu_layout import column, head_lanes, kept, product


def backward(residuals, dout, config):
    """See `AttentionKernels`."""
    q, k, v, mask, out, lse = residuals
    dims = PipelineDims.of(q, k)
    delta = online_softmax.row_products(dout, out)
    live = ~jnp.isneginf(lse)
    # exp2(finite - inf) is 0: a query that sees nothing weighs nothing.
    base = dims.stats(jnp.where(live, lse * online_softmax.LOG2E, jnp.inf), jnp.inf)
    delta = dims.stats(jnp.where(live, delta, 0), 0)
    sees = live.any(2)
    inputs = (
        dims.limits(*(jnp.where(sees, x, 0) for x in (mask.lo, mask.hi))),
        jnp.concatenate([base, delta], axis=2),
        dims.queries(q),
        dims.queries(dout.astype(q.dtype)),
        dims.all_keys(k),
        dims.all_keys(v),
    )
    dq = _query_gradient(inputs, mask, dims, config)
    dk, dv = _key_gradients(inputs, mask, dims, config)
    return dims.unflat(dq, q), dims.unflat(dk, k), dims.unflat(dv, v)


def _query_gradient(inputs, mask, dims, config):
    """dq [b tiles*block_q n*LANES], a step per tile of queries."""
    limits, stats, q, dout, k, v = inputs
    schedule = TileSchedule.by_query(mask, dims.t, block_q=dims.block_q, block_kv=dims.block_kv)
    visits, visit_specs = schedule_inputs(schedule)
    query = pl.BlockSpec(
        (None, dims.block_q, dims.group * LANES), lambda row, head, tile: (row, tile, head)
    )
    limit = pl.BlockSpec((None, 2, dims.block_q), lambda row, head, tile: (row, 0, tile))
    stat = pl.BlockSpec(
        (None, None, 2 * dims.group, dims.block_q), lambda row, head, tile: (row, head, 0, tile)
    )
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    return compat.mosaic_call(
        functools.partial(_query_kernel, dims=dims, scale=config.scale),
        grid=(dims.b, dims.heads, dims.tiles),
        in_specs=[*visit_specs, limit, stat, query, query, in_hbm, in_hbm, in_hbm],
        out_specs=query,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_shapes=[
            pltpu.VMEM((dims.group, LANES, dims.block_q), jnp.float32),
            pltpu.VMEM((BUFFERS, 1, dims.block_kv), jnp.int32),
            pltpu.VMEM((BUFFERS, dims.block_kv, LANES), k.dtype),
            pltpu.VMEM((BUFFERS, dims.block_kv, LANES), v.dtype),
            pltpu.SemaphoreType.DMA((3, BUFFERS)),
        ],
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=dims.vmem,
        interpret=config.interpret,
        name=f"{config.name}_bwd_dq",
    )(*visits, limits, stats, q, dout, dims.positions(schedule.key_pos), k, v)


def _query_kernel(*refs, dims, scale):
    """dq of one tile: its rows q, dout [block_q group*LANES] over its key tiles."""
    *schedule, limits, stats, q, dout, key_pos, k, v, dq, total, pos, k_tiles, v_tiles, sems = refs
    lo, hi = limits[0:1], limits[1:2]
    total[...] = jnp.zeros(total.shape, jnp.float32)

    def add(k_tile, v_tile, see):
        turned = k_tile.T
        for i in range(dims.group):
            base, delta = stats[i : i + 1], stats[dims.group + i : dims.group + i + 1]
            logits = product(k_tile, q[:, head_lanes(i)], 1, 1) * (scale * online_softmax.LOG2E)
            weights = online_softmax.shown(jnp.exp2(logits - base), see)  # [block_kv block_q]
            dlogits = weights * (product(v_tile, dout[:, head_lanes(i)], 1, 1) - delta)
            total[i] += product(turned, dlogits.astype(turned.dtype), 1, 0)

    def partial(slot):
        at = column(pos[slot], dims.block_q)
        # 0 in place of the keys that nobody sees: they may be NaN, which a weight of 0 would keep.
        used = at[:, :LANES] >= 0
        add(kept(k_tiles[slot], used), kept(v_tiles[slot], used), (lo <= at) & (at < hi))

    def full(slot):
        add(k_tiles[slot], v_tiles[slot], None)

    streams = key_streams(dims, (key_pos, k, v), (pos, k_tiles, v_tiles))
    tile_loop(schedule, streams, sems, (full, partial))
    for i in range(dims.group):
        live = stats[i : i + 1] != jnp.inf
        dq[:, head_lanes(i)] = jnp.where(live, total[i] * scale, 0.0).T.astype(dq.dtype)


def _key_gradients(inputs, mask, dims, config):
    """dk, dv [b kv_tiles*block_kv k*LANES], a step per tile of keys."""
    limits, stats, q, dout, k, v = inputs
    schedule = TileSchedule.by_key(mask, dims.t, block_q=dims.block_q, block_kv=dims.block_kv)
    visits, visit_specs = schedule_inputs(schedule)
    keys = pl.BlockSpec((None, dims.block_kv, LANES), lambda row, head, tile: (row, tile, head))
    key_pos = pl.BlockSpec((None, 1, dims.block_kv), lambda row, head, tile: (row, 0, tile))
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    wide = dims.group * LANES
    return compat.mosaic_call(
        functools.partial(_key_kernel, dims=dims, scale=config.scale),
        grid=(dims.b, dims.heads, dims.kv_tiles),
        in_specs=[*visit_specs, key_pos, keys, keys, in_hbm, in_hbm, in_hbm, in_hbm],
        out_specs=(keys, keys),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)),
        scratch_shapes=[
            pltpu.VMEM((2, dims.block_kv, LANES), k.dtype),
            pltpu.VMEM((2, dims.block_kv, LANES), jnp.float32),
            pltpu.VMEM((BUFFERS, 2, dims.block_q), jnp.int32),
            pltpu.VMEM((BUFFERS, 2 * dims.group, dims.block_q), jnp.float32),
            pltpu.VMEM((BUFFERS, dims.block_q, wide), q.dtype),
            pltpu.VMEM((BUFFERS, dims.block_q, wide), q.dtype),
            pltpu.SemaphoreType.DMA((4, BUFFERS)),
        ],
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=dims.vmem,
        interpret=config.interpret,
        name=f"{config.name}_bwd_dkv",
    )(*visits, dims.positions(schedule.key_pos), k, v, limits, stats, q, dout)


def _key_kernel(*refs, dims, scale):
    """dk and dv of one tile: its keys [block_kv LANES] over the tiles of queries that see them."""
    *schedule, key_pos, k, v, limits, stats, q, dout, dk, dv = refs[:-7]
    pair, sums, edges, stat_tiles, q_tiles, dout_tiles, sems = refs[-7:]
    at = column(key_pos[...], dims.block_q)
    used = at[:, :LANES] >= 0  # what nobody sees may be NaN
    pair[0], pair[1] = kept(k[...], used), kept(v[...], used)
    sums[...] = jnp.zeros(sums.shape, jnp.float32)

    def add(slot, *, is_full):
        lo, hi = edges[slot, 0:1], edges[slot, 1:2]
        live = (hi > lo).astype(jnp.float32)

        @pl.when(live.min() == 0)
        def _():  # what a query that sees nothing holds may be NaN
            keep = column(live, LANES) > 0
            for x in (q_tiles, dout_tiles):
                for i in range(dims.group):
                    x[slot, :, head_lanes(i)] = kept(x[slot, :, head_lanes(i)], keep)

        see = None if is_full else (lo <= at) & (at < hi)
        for i in range(dims.group):
            base = stat_tiles[slot, i : i + 1]
            delta = stat_tiles[slot, dims.group + i : dims.group + i + 1]
            queries, douts = (x[slot, :, head_lanes(i)] for x in (q_tiles, dout_tiles))
            logits = product(pair[0], queries, 1, 1) * (scale * online_softmax.LOG2E)
            weights = online_softmax.shown(jnp.exp2(logits - base), see)  # [block_kv block_q]
            dlogits = weights * (product(pair[1], douts, 1, 1) - delta)
            sums[0] += product(dlogits.astype(queries.dtype), queries, 1, 0)
            sums[1] += product(weights.astype(queries.dtype), douts, 1, 0)

    row, kv_head = pl.program_id(0), pl.program_id(1)
    wide = dims.group * LANES
    lanes = pl.ds(pl.multiple_of(kv_head * wide, LANES), wide)

    def places(number):
        return pl.ds(pl.multiple_of(number * dims.block_q, dims.block_q), dims.block_q)

    streams = (
        (lambda number: limits.at[row, :, places(number)], edges),
        (lambda number: stats.at[row, kv_head, :, places(number)], stat_tiles),
        (lambda number: q.at[row, places(number), lanes], q_tiles),
        (lambda number: dout.at[row, places(number), lanes], dout_tiles),
    )
    steps = tuple(functools.partial(add, is_full=x) for x in (True, False))
    tile_loop(schedule, streams, sems, steps)
    dk[...] = (sums[0] * scale).astype(dk.dtype)
    dv[...] = sums[1].astype(dv.dtype)
