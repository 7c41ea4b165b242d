"""Attention under a `Sight` on NVIDIA GPUs: the kernel of the branches that see ranges of keys.

A program takes a tile of queries of one head, walks the key tiles of its schedule and keeps the
softmax statistics in float32: first the tiles that it sees whole, without a mask, then the others.
Where the queries are few, the heads of a group become queries, so that keys are read once per
group, and several programs share the keys of a tile; their results are merged by lse in a fixed
order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.compat import pl, plgpu
from pallas_kernels.flash_attention import gqa_packing as few_queries
from pallas_kernels.flash_attention import online_softmax as tile_math
from pallas_kernels.flash_attention import triton_bwd as triton_flash_backward
from pallas_kernels.flash_attention.tile_schedule import Visits
from pallas_kernels.flash_attention.triton_loop import (
    LEAST_ROWS,
    LEAST_VISITS,
    load,
    per_tile,
    sizes,
    store,
    walk,
)

PROGRAMS = 264  # to keep a Hopper GPU busy: two for each of its 132 multiprocessors


@functools.partial(jax.custom_vjp, nondiff_argnames=("job",))
def attend(q, k, v, sight, job):
    """Softmax attention of each query over the keys it sees; `flash.attend` by a kernel.

    Args:
      q: float[b s n h] queries; query head i reads KV head i // (n // k).
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
    if group == 1 or s * group > sizes("decode_attention", q).rows:
        return _launch(q, k, v, sight, "fwd", job)
    folded = few_queries.fold(q, heads)
    return few_queries.unfold(*_launch(folded, k, v, sight, "decode", job), q.shape)


def _attend_fwd(q, k, v, sight, job):
    out, lse = attend(q, k, v, sight, job)
    return (out, lse), (q, k, v, sight, out, lse)


def _attend_bwd(job, residuals, cotangents):
    return *triton_flash_backward.backward(residuals, cotangents[0], job), None


attend.defvjp(_attend_fwd, _attend_bwd)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Programs of one launch: the grid is (tiles, heads, rows of the batch x splits).

    Attributes:
      rows: rows of a tile.
      tiles: tiles per head.
      splits: programs that share the keys of a tile.
      group: heads per KV head.
    """

    rows: int
    tiles: int
    splits: int
    group: int


def _launch(q, k, v, sight, part, job):
    """Runs the kernel: out, lse of q [b s n h]; each query of `sight` has s // queries rows."""
    b, s, n, h = q.shape
    t, heads = k.shape[1:3]
    queries = sight.lo.shape[1]
    params = sizes("decode_attention" if part == "decode" else job.name, q)
    rows = min(max(pl.next_power_of_2(s), LEAST_ROWS), params.rows)
    count = -(-s // rows)
    reach = t if job.reach is None else min(job.reach + rows, t)
    splits = min(PROGRAMS // (count * n * b), reach // (params.keys * LEAST_VISITS))
    cut = _Cut(rows, count, max(splits, 1), n // heads)

    def per_row(x):
        """i32[b queries] -> i32[b tiles*rows]; rows that fill the last tile see nothing."""
        return per_tile(jnp.repeat(x, s // queries, axis=1), count * rows, 0)

    visits = Visits.plan(sight, t, queries=min(rows, queries), keys=params.keys)
    schedule = [visits.spans] if visits.ids is None else [visits.spans, visits.ids]
    in_specs, out_specs = _specs(cut, schedule, k.shape)
    partial_dtype = q.dtype if cut.splits == 1 else jnp.float32
    out, lse = compat.triton_call(
        functools.partial(
            _interval_kernel,
            cut=cut,
            queries=s,
            keys=params.keys,
            width=h,
            scale=job.scale * tile_math.LOG2E,
        ),
        grid=(count, n, b * cut.splits),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=(
            jax.ShapeDtypeStruct((b * cut.splits, s, n, h), partial_dtype),
            jax.ShapeDtypeStruct((b * cut.splits, s, n), jnp.float32),
        ),
        num_warps=params.num_warps,
        num_stages=params.num_stages,
        interpret=job.interpret,
        name=f"{job.name}_{part}",
    )(*schedule, per_row(jnp.maximum(sight.lo, 0)), per_row(sight.hi), visits.key_pos, q, k, v)
    return (out, lse) if cut.splits == 1 else _merge(out, lse, cut.splits, q.dtype)


def _specs(cut, schedule, k_shape):
    """What each program sees of the inputs and outputs: heads filled up to a power of two."""
    t, wide = k_shape[1], pl.next_power_of_2(k_shape[3])

    def spec(block, index, *, per_split=False):
        def place(i, head, z):
            row = z if per_split else jax.lax.div(z, cut.splits)
            return row, *index(_tile(i, cut), head)

        return pl.BlockSpec((None, *block), place)

    query = (cut.rows, None, wide), lambda tile, head: (tile, head, 0)
    stats = (cut.rows, None), lambda tile, head: (tile, head)
    limit = spec((cut.rows,), lambda tile, head: (tile,))
    keys = spec((t, None, wide), lambda tile, head: (0, jax.lax.div(head, cut.group), 0))
    lists = [spec((None, x.shape[2]), lambda tile, head: (tile, 0)) for x in schedule]
    key_pos = spec((t,), lambda tile, head: (0,))
    in_specs = [*lists, limit, limit, key_pos, spec(*query), keys, keys]
    return in_specs, (spec(*query, per_split=True), spec(*stats, per_split=True))


def _tile(i, cut):
    """The tile of program i: the last first, which see the most keys where attention is causal."""
    return cut.tiles - 1 - i


def _merge(out, lse, splits, dtype):
    """Joins the results [b*splits s n ..] over disjoint sets of keys."""
    out, lse = (x.reshape(-1, splits, *x.shape[1:]) for x in (out, lse))
    top = tile_math.finite(lse.max(1))
    weights = jnp.exp(lse - top[:, None])
    total = weights.sum(1)
    safe = jnp.where(total == 0, 1.0, total)
    out = (out * weights[..., None]).sum(1) / safe[..., None]
    return out.astype(dtype), jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))


def _interval_kernel(*refs, cut, queries, keys, width, scale):
    """One tile: its rows q [m wide] over its key tiles in k, v [t wide]; exponents are of 2.

    Of the columns `width` exist, of the rows those of `queries` queries.
    """
    *schedule, lo, hi, key_pos, q, k, v, out, lse = refs
    lo, hi = lo[...], hi[...]
    live = hi > lo
    m = lo.shape[0]
    rows = load(q, (pl.ds(0, m),), live, width)

    def whole(number, _, state):
        at = (pl.ds(number * keys, keys),)
        k_tile, v_tile = (load(x, at, None, width) for x in (k, v))
        logits = tile_math.product(rows, k_tile, 1, 1) * scale
        return tile_math.add_keys(state, logits, v_tile)

    def part(number, _, state):
        at = (pl.ds(number * keys, keys),)
        inside = number * keys + jnp.arange(keys) < key_pos.shape[0]
        pos = plgpu.load(key_pos.at[at], mask=inside, other=-1)
        # 0 in place of the keys that nobody sees: they may be NaN, which a weight of 0 would keep.
        k_tile, v_tile = (load(x, at, pos >= 0, width) for x in (k, v))
        see = (lo[:, None] <= pos[None]) & (pos[None] < hi[:, None])
        logits = tile_math.product(rows, k_tile, 1, 1) * scale
        return tile_math.add_keys(state, jnp.where(see, logits, -jnp.inf), v_tile)

    state = jnp.full(m, -jnp.inf), jnp.zeros(m), jnp.zeros(rows.shape)
    split = jax.lax.rem(pl.program_id(2), cut.splits)
    state = walk(schedule, (whole, part), state, split=split, splits=cut.splits)
    exists = _tile(pl.program_id(0), cut) * m + jnp.arange(m) < queries
    _store(state, live, exists, width, out, lse)


def _store(state, live, exists, width, out, lse):
    """Writes the rows that exist; 0 and -inf where a query sees nothing."""
    top, total, acc = state
    some = live & (total != 0)
    safe = jnp.where(some, total, 1.0)
    store(out, jnp.where(some[:, None], acc / safe[:, None], 0.0), exists, width)
    plgpu.store(lse, jnp.where(some, top / tile_math.LOG2E + jnp.log(safe), -jnp.inf), mask=exists)
