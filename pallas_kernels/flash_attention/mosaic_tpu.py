"""Attention under a `KeyRangeMask` on TPUs.

A step takes a tile of queries with all heads of a group, visits the key tiles of its schedule and
keeps the softmax statistics in float32: first the full tiles, without a mask, then the partial
ones. The tiles are copied from HBM while the one before is at work, so that no length of keys is
too long for the vector memory, and a short range of keys costs as much as it has tiles. Where the
queries are few, the heads of a group become queries.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes.tpu import LANES
from pallas_kernels.compat import pl, pltpu
from pallas_kernels.flash_attention import mosaic_tpu_bwd, online_softmax
from pallas_kernels.flash_attention.attention_kernels import AttentionKernels
from pallas_kernels.flash_attention.gqa_packing import pack_gqa, unpack_gqa
from pallas_kernels.flash_attention.mosaic_tpu_pipeline import (
    BUFFERS,
    PipelineDims,
    key_streams,
    schedule_inputs,
    tile_loop,
)
from pallas_kernels.flash_attention.tile_schedule import TileSchedule
from pallas_kernels.tpu_layout import column, head_lanes, kept, product


def forward(q, k, v, mask, config):
    """See `AttentionKernels`; h is at most 128, and the mask is one without blocks."""
    s, heads = q.shape[1], k.shape[2]
    group = q.shape[2] // heads
    if group == 1 or s * group > LANES:
        return _launch(q, k, v, mask, config)
    lo, hi = (jnp.repeat(x, group, axis=1) for x in (mask.lo, mask.hi))
    mask = dataclasses.replace(mask, lo=lo, hi=hi)
    return unpack_gqa(*_launch(pack_gqa(q, heads), k, v, mask, config), q.shape)


KERNELS = AttentionKernels(forward, mosaic_tpu_bwd.backward)


def _launch(q, k, v, mask, config):
    """Runs the kernel: out, lse of q [b s n h]."""
    dims = PipelineDims.of(q, k)
    schedule = TileSchedule.by_query(mask, dims.t, block_q=dims.block_q, block_kv=dims.block_kv)
    visits, visit_specs = schedule_inputs(schedule)
    wide = dims.group * LANES
    query = pl.BlockSpec((None, dims.block_q, wide), lambda row, head, tile: (row, tile, head))
    limit = pl.BlockSpec((None, 2, dims.block_q), lambda row, head, tile: (row, 0, tile))
    stats = pl.BlockSpec(
        (None, None, dims.group, dims.block_q), lambda row, head, tile: (row, head, 0, tile)
    )
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    length = dims.tiles * dims.block_q
    out, lse = compat.mosaic_call(
        functools.partial(_kernel, dims=dims, scale=config.scale * online_softmax.LOG2E),
        grid=(dims.b, dims.heads, dims.tiles),
        in_specs=[*visit_specs, limit, query, in_hbm, in_hbm, in_hbm],
        out_specs=(query, stats),
        out_shape=(
            jax.ShapeDtypeStruct((dims.b, length, dims.heads * wide), q.dtype),
            jax.ShapeDtypeStruct((dims.b, dims.heads, dims.group, length), jnp.float32),
        ),
        scratch_shapes=[
            pltpu.VMEM((dims.group, LANES, dims.block_q), jnp.float32),
            pltpu.VMEM((dims.group, dims.block_q), jnp.float32),
            pltpu.VMEM((dims.group, dims.block_q), jnp.float32),
            pltpu.VMEM((BUFFERS, 1, dims.block_kv), jnp.int32),
            pltpu.VMEM((BUFFERS, dims.block_kv, LANES), k.dtype),
            pltpu.VMEM((BUFFERS, dims.block_kv, LANES), v.dtype),
            pltpu.SemaphoreType.DMA((3, BUFFERS)),
        ],
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=dims.vmem,
        interpret=config.interpret,
        name=f"{config.name}_fwd",
    )(
        *visits,
        dims.limits(mask.lo, mask.hi),
        dims.queries(q),
        dims.positions(schedule.key_pos),
        dims.all_keys(k),
        dims.all_keys(v),
    )
    return dims.unflat(out, q), dims.unstats(lse)


def _kernel(*refs, dims, scale):
    """One tile: its rows q [block_q group*LANES] over its key tiles; exponents are of 2."""
    *schedule, limits, q, key_pos, k, v, out, lse, o, m, l, pos, k_tiles, v_tiles, sems = refs
    lo, hi = limits[0:1], limits[1:2]
    o[...] = jnp.zeros(o.shape, jnp.float32)
    m[...] = jnp.full(m.shape, -jnp.inf)
    l[...] = jnp.zeros(l.shape, jnp.float32)

    def add(slot, values, see):
        values = values.T
        for i in range(dims.group):
            logits = product(k_tiles[slot], q[:, head_lanes(i)], 1, 1) * scale  # [block_kv block_q]
            if see is not None:
                logits = jnp.where(see, logits, -jnp.inf)
            old = m[i : i + 1]
            new = jnp.maximum(old, logits.max(0, keepdims=True))
            base = jnp.where(new == -jnp.inf, 0.0, new)
            alpha, weights = jnp.exp2(old - base), jnp.exp2(logits - base)
            m[i : i + 1] = new
            l[i : i + 1] = l[i : i + 1] * alpha + weights.sum(0, keepdims=True)
            o[i] = o[i] * alpha + product(values, weights.astype(values.dtype), 1, 0)

    def full(slot):
        add(slot, v_tiles[slot], None)

    def partial(slot):
        at = column(pos[slot], dims.block_q)
        # 0 in place of values that nobody sees: they may be NaN, which a weight of 0 would keep.
        values = kept(v_tiles[slot], at[:, :LANES] >= 0)
        add(slot, values, (lo <= at) & (at < hi))

    streams = key_streams(dims, (key_pos, k, v), (pos, k_tiles, v_tiles))
    tile_loop(schedule, streams, sems, (full, partial))
    _store((m, l, o), hi > lo, out, lse)


def _store(state, live, out, lse):
    """Writes the results of a tile; 0 and -inf where a query sees nothing."""
    m, l, o = state
    for i in range(o.shape[0]):
        some = live & (l[i : i + 1] != 0)
        safe = jnp.where(some, l[i : i + 1], 1.0)
        out[:, head_lanes(i)] = jnp.where(some, o[i] / safe, 0.0).T.astype(out.dtype)
        value = m[i : i + 1] / online_softmax.LOG2E + jnp.log(safe)
        lse[i : i + 1] = jnp.where(some, value, -jnp.inf)
