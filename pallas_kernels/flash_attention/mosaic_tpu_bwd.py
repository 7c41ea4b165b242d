"""The gradients of `mosaic_flash.attend`, by two kernels that recompute the weights from lse.

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
from pallas_kernels.flash_attention import online_softmax as tile_math
from pallas_kernels.flash_attention.mosaic_tpu_pipeline import (
    BUFFERS,
    Cut,
    column,
    head_lanes,
    kept,
    key_streams,
    product,
    schedule,
    walk,
)
from pallas_kernels.flash_attention.tile_schedule import Visits


def backward(residuals, dout, job):
    """The gradients of `attend`.

    Args:
      residuals: q, k, v and sight as `attend` takes them, out and lse as it returns them.
      dout: float[b s n h] gradient of `out`.
      job: which operation this is.

    Returns:
      dq, dk, dv in the shapes and dtypes of q, k, v.
    """
    q, k, v, sight, out, lse = residuals
    cut = Cut.of(q, k)
    delta = tile_math.row_products(dout, out)
    live = ~jnp.isneginf(lse)
    # exp2(finite - inf) is 0: a query that sees nothing weighs nothing.
    base = cut.stats(jnp.where(live, lse * tile_math.LOG2E, jnp.inf), jnp.inf)
    delta = cut.stats(jnp.where(live, delta, 0), 0)
    sees = live.any(2)
    inputs = (
        cut.limits(*(jnp.where(sees, x, 0) for x in (sight.lo, sight.hi))),
        jnp.concatenate([base, delta], axis=2),
        cut.queries(q),
        cut.queries(dout.astype(q.dtype)),
        cut.all_keys(k),
        cut.all_keys(v),
    )
    dq = _query_gradient(inputs, sight, cut, job)
    dk, dv = _key_gradients(inputs, sight, cut, job)
    return cut.unflat(dq, q), cut.unflat(dk, k), cut.unflat(dv, v)


def _query_gradient(inputs, sight, cut, job):
    """dq [b tiles*rows n*LANES], a step per tile of queries."""
    limits, stats, q, dout, k, v = inputs
    visits = Visits.plan(sight, cut.t, queries=cut.rows, keys=cut.keys)
    plan, plan_specs = schedule(visits)
    query = pl.BlockSpec(
        (None, cut.rows, cut.group * LANES), lambda row, head, tile: (row, tile, head)
    )
    limit = pl.BlockSpec((None, 2, cut.rows), lambda row, head, tile: (row, 0, tile))
    stat = pl.BlockSpec(
        (None, None, 2 * cut.group, cut.rows), lambda row, head, tile: (row, head, 0, tile)
    )
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    return compat.mosaic_call(
        functools.partial(_query_kernel, cut=cut, scale=job.scale),
        grid=(cut.b, cut.heads, cut.tiles),
        in_specs=[*plan_specs, limit, stat, query, query, in_hbm, in_hbm, in_hbm],
        out_specs=query,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_shapes=[
            pltpu.VMEM((cut.group, LANES, cut.rows), jnp.float32),
            pltpu.VMEM((BUFFERS, 1, cut.keys), jnp.int32),
            pltpu.VMEM((BUFFERS, cut.keys, LANES), k.dtype),
            pltpu.VMEM((BUFFERS, cut.keys, LANES), v.dtype),
            pltpu.SemaphoreType.DMA((3, BUFFERS)),
        ],
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=cut.vmem,
        interpret=job.interpret,
        name=f"{job.name}_bwd_dq",
    )(*plan, limits, stats, q, dout, cut.positions(visits.key_pos), k, v)


def _query_kernel(*refs, cut, scale):
    """dq of one tile: its rows q, dout [rows group*LANES] over its key tiles."""
    *plan, limits, stats, q, dout, key_pos, k, v, dq, acc, pos, k_tiles, v_tiles, sems = refs
    lo, hi = limits[0:1], limits[1:2]
    acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def add(k_tile, v_tile, see):
        turned = k_tile.T
        for i in range(cut.group):
            base, delta = stats[i : i + 1], stats[cut.group + i : cut.group + i + 1]
            logits = product(k_tile, q[:, head_lanes(i)], 1, 1) * (scale * tile_math.LOG2E)
            weights = tile_math.shown(jnp.exp2(logits - base), see)  # [keys rows]
            dlogits = weights * (product(v_tile, dout[:, head_lanes(i)], 1, 1) - delta)
            acc[i] += product(turned, dlogits.astype(turned.dtype), 1, 0)

    def part(slot):
        at = column(pos[slot], cut.rows)
        # 0 in place of the keys that nobody sees: they may be NaN, which a weight of 0 would keep.
        used = at[:, :LANES] >= 0
        add(kept(k_tiles[slot], used), kept(v_tiles[slot], used), (lo <= at) & (at < hi))

    def whole(slot):
        add(k_tiles[slot], v_tiles[slot], None)

    walk(plan, key_streams(cut, (key_pos, k, v), (pos, k_tiles, v_tiles)), sems, (whole, part))
    for i in range(cut.group):
        live = stats[i : i + 1] != jnp.inf
        dq[:, head_lanes(i)] = jnp.where(live, acc[i] * scale, 0.0).T.astype(dq.dtype)


def _key_gradients(inputs, sight, cut, job):
    """dk, dv [b key_tiles*keys k*LANES], a step per tile of keys."""
    limits, stats, q, dout, k, v = inputs
    visits = Visits.plan_by_key(sight, cut.t, queries=cut.rows, keys=cut.keys)
    plan, plan_specs = schedule(visits)
    keys = pl.BlockSpec((None, cut.keys, LANES), lambda row, head, tile: (row, tile, head))
    key_pos = pl.BlockSpec((None, 1, cut.keys), lambda row, head, tile: (row, 0, tile))
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    wide = cut.group * LANES
    return compat.mosaic_call(
        functools.partial(_key_kernel, cut=cut, scale=job.scale),
        grid=(cut.b, cut.heads, cut.key_tiles),
        in_specs=[*plan_specs, key_pos, keys, keys, in_hbm, in_hbm, in_hbm, in_hbm],
        out_specs=(keys, keys),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)),
        scratch_shapes=[
            pltpu.VMEM((2, cut.keys, LANES), k.dtype),
            pltpu.VMEM((2, cut.keys, LANES), jnp.float32),
            pltpu.VMEM((BUFFERS, 2, cut.rows), jnp.int32),
            pltpu.VMEM((BUFFERS, 2 * cut.group, cut.rows), jnp.float32),
            pltpu.VMEM((BUFFERS, cut.rows, wide), q.dtype),
            pltpu.VMEM((BUFFERS, cut.rows, wide), q.dtype),
            pltpu.SemaphoreType.DMA((4, BUFFERS)),
        ],
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=cut.vmem,
        interpret=job.interpret,
        name=f"{job.name}_bwd_dkv",
    )(*plan, cut.positions(visits.key_pos), k, v, limits, stats, q, dout)


def _key_kernel(*refs, cut, scale):
    """dk and dv of one tile: its keys [keys LANES] over the tiles of queries that see them."""
    *plan, key_pos, k, v, limits, stats, q, dout, dk, dv = refs[:-7]
    pair, sums, edges, stat_tiles, q_tiles, dout_tiles, sems = refs[-7:]
    at = column(key_pos[...], cut.rows)
    used = at[:, :LANES] >= 0  # what nobody sees may be NaN
    pair[0], pair[1] = kept(k[...], used), kept(v[...], used)
    sums[...] = jnp.zeros(sums.shape, jnp.float32)

    def add(slot, *, is_whole):
        lo, hi = edges[slot, 0:1], edges[slot, 1:2]
        live = (hi > lo).astype(jnp.float32)

        @pl.when(live.min() == 0)
        def _():  # what a query that sees nothing holds may be NaN
            keep = column(live, LANES) > 0
            for x in (q_tiles, dout_tiles):
                for i in range(cut.group):
                    x[slot, :, head_lanes(i)] = kept(x[slot, :, head_lanes(i)], keep)

        see = None if is_whole else (lo <= at) & (at < hi)
        for i in range(cut.group):
            base = stat_tiles[slot, i : i + 1]
            delta = stat_tiles[slot, cut.group + i : cut.group + i + 1]
            queries, douts = (x[slot, :, head_lanes(i)] for x in (q_tiles, dout_tiles))
            logits = product(pair[0], queries, 1, 1) * (scale * tile_math.LOG2E)
            weights = tile_math.shown(jnp.exp2(logits - base), see)  # [keys rows]
            dlogits = weights * (product(pair[1], douts, 1, 1) - delta)
            sums[0] += product(dlogits.astype(queries.dtype), queries, 1, 0)
            sums[1] += product(weights.astype(queries.dtype), douts, 1, 0)

    row, kv_head = pl.program_id(0), pl.program_id(1)
    wide = cut.group * LANES
    lanes = pl.ds(pl.multiple_of(kv_head * wide, LANES), wide)

    def places(number):
        return pl.ds(pl.multiple_of(number * cut.rows, cut.rows), cut.rows)

    streams = (
        (lambda number: limits.at[row, :, places(number)], edges),
        (lambda number: stats.at[row, kv_head, :, places(number)], stat_tiles),
        (lambda number: q.at[row, places(number), lanes], q_tiles),
        (lambda number: dout.at[row, places(number), lanes], dout_tiles),
    )
    steps = tuple(functools.partial(add, is_whole=x) for x in (True, False))
    walk(plan, streams, sems, steps)
    dk[...] = (sums[0] * scale).astype(dk.dtype)
    dv[...] = sums[1].astype(dv.dtype)
