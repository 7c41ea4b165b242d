"""Attention under a `Sight` on TPUs: the kernel of the branches that see ranges of keys.

A step takes a tile of queries with all heads of a group, walks the key tiles of its schedule and
keeps the softmax statistics in float32: first the tiles that it sees whole, without a mask, then
the others. The tiles are copied from HBM while the one before is at work, so that no length of keys
is too long for the vector memory, and a short range of keys costs as much as it has tiles. Where
the queries are few, the heads of a group become queries.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes.tpu import LANES
from pallas_kernels.compat import pl, pltpu
from pallas_kernels.flash_attention import gqa_packing as few_queries
from pallas_kernels.flash_attention import mosaic_tpu_bwd as mosaic_flash_backward
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


@functools.partial(jax.custom_vjp, nondiff_argnames=("job",))
def attend(q, k, v, sight, job):
    """Softmax attention of each query over the keys it sees; `flash.attend` by a kernel.

    Args:
      q: float[b s n h] queries, h <= 128; query head i reads KV head i // (n // k).
      k: float[b t k h] keys.
      v: float[b t k h] values.
      sight: what each query sees; without blocks.
      job: which operation this is.

    Returns:
      out float[b s n h], dtype of `q`, and lse float32[b s n], the logarithm of the softmax
      denominator, which carries no gradient; 0 and -inf for a query that sees nothing.
    """
    s, heads = q.shape[1], k.shape[2]
    group = q.shape[2] // heads
    if group == 1 or s * group > LANES:
        return _launch(q, k, v, sight, job)
    lo, hi = (jnp.repeat(x, group, axis=1) for x in (sight.lo, sight.hi))
    sight = dataclasses.replace(sight, lo=lo, hi=hi)
    return few_queries.unfold(*_launch(few_queries.fold(q, heads), k, v, sight, job), q.shape)


def _attend_fwd(q, k, v, sight, job):
    out, lse = attend(q, k, v, sight, job)
    return (out, lse), (q, k, v, sight, out, lse)


def _attend_bwd(job, residuals, cotangents):
    return *mosaic_flash_backward.backward(residuals, cotangents[0], job), None


attend.defvjp(_attend_fwd, _attend_bwd)


def _launch(q, k, v, sight, job):
    """Runs the kernel: out, lse of q [b s n h]."""
    cut = Cut.of(q, k)
    visits = Visits.plan(sight, cut.t, queries=cut.rows, keys=cut.keys)
    plan, plan_specs = schedule(visits)
    wide = cut.group * LANES
    query = pl.BlockSpec((None, cut.rows, wide), lambda row, head, tile: (row, tile, head))
    limit = pl.BlockSpec((None, 2, cut.rows), lambda row, head, tile: (row, 0, tile))
    stats = pl.BlockSpec(
        (None, None, cut.group, cut.rows), lambda row, head, tile: (row, head, 0, tile)
    )
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    length = cut.tiles * cut.rows
    out, lse = compat.mosaic_call(
        functools.partial(_kernel, cut=cut, scale=job.scale * tile_math.LOG2E),
        grid=(cut.b, cut.heads, cut.tiles),
        in_specs=[*plan_specs, limit, query, in_hbm, in_hbm, in_hbm],
        out_specs=(query, stats),
        out_shape=(
            jax.ShapeDtypeStruct((cut.b, length, cut.heads * wide), q.dtype),
            jax.ShapeDtypeStruct((cut.b, cut.heads, cut.group, length), jnp.float32),
        ),
        scratch_shapes=[
            pltpu.VMEM((cut.group, LANES, cut.rows), jnp.float32),
            pltpu.VMEM((cut.group, cut.rows), jnp.float32),
            pltpu.VMEM((cut.group, cut.rows), jnp.float32),
            pltpu.VMEM((BUFFERS, 1, cut.keys), jnp.int32),
            pltpu.VMEM((BUFFERS, cut.keys, LANES), k.dtype),
            pltpu.VMEM((BUFFERS, cut.keys, LANES), v.dtype),
            pltpu.SemaphoreType.DMA((3, BUFFERS)),
        ],
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=cut.vmem,
        interpret=job.interpret,
        name=f"{job.name}_fwd",
    )(
        *plan,
        cut.limits(sight.lo, sight.hi),
        cut.queries(q),
        cut.positions(visits.key_pos),
        cut.all_keys(k),
        cut.all_keys(v),
    )
    return cut.unflat(out, q), cut.unstats(lse)


def _kernel(*refs, cut, scale):
    """One tile: its rows q [rows group*LANES] over its key tiles; exponents are of 2."""
    *plan, limits, q, key_pos, k, v, out, lse, acc, top, total, pos, k_tiles, v_tiles, sems = refs
    lo, hi = limits[0:1], limits[1:2]
    acc[...] = jnp.zeros(acc.shape, jnp.float32)
    top[...] = jnp.full(top.shape, -jnp.inf)
    total[...] = jnp.zeros(total.shape, jnp.float32)

    def add(slot, values, see):
        values = values.T
        for i in range(cut.group):
            logits = product(k_tiles[slot], q[:, head_lanes(i)], 1, 1) * scale  # [keys rows]
            if see is not None:
                logits = jnp.where(see, logits, -jnp.inf)
            old = top[i : i + 1]
            new = jnp.maximum(old, logits.max(0, keepdims=True))
            base = jnp.where(new == -jnp.inf, 0.0, new)
            decay, weights = jnp.exp2(old - base), jnp.exp2(logits - base)
            top[i : i + 1] = new
            total[i : i + 1] = total[i : i + 1] * decay + weights.sum(0, keepdims=True)
            acc[i] = acc[i] * decay + product(values, weights.astype(values.dtype), 1, 0)

    def part(slot):
        at = column(pos[slot], cut.rows)
        # 0 in place of values that nobody sees: they may be NaN, which a weight of 0 would keep.
        values = kept(v_tiles[slot], at[:, :LANES] >= 0)
        add(slot, values, (lo <= at) & (at < hi))

    streams = key_streams(cut, (key_pos, k, v), (pos, k_tiles, v_tiles))
    walk(plan, streams, sems, (lambda slot: add(slot, v_tiles[slot], None), part))
    _store((acc, top, total), hi > lo, out, lse)


def _store(state, live, out, lse):
    """Writes the results of a tile; 0 and -inf where a query sees nothing."""
    acc, top, total = state
    for i in range(acc.shape[0]):
        some = live & (total[i : i + 1] != 0)
        safe = jnp.where(some, total[i : i + 1], 1.0)
        out[:, head_lanes(i)] = jnp.where(some, acc[i] / safe, 0.0).T.astype(out.dtype)
        lse[i : i + 1] = jnp.where(some, top[i : i + 1] / tile_math.LOG2E + jnp.log(safe), -jnp.inf)
