"""The gradients of `triton_flash.attend`, by two kernels that recompute the weights from lse.

One takes a tile of queries of one head over the key tiles of the forward pass, for dq. The other
takes a tile of keys of one KV head over the tiles of queries that see it, for each head of the
group, for dk and dv. Where the tiles are few, several programs share the visits of a tile; their
float32 results are added in a fixed order. No program adds to what another one wrote.

A query that sees nothing is dropped by its lse; what it holds, and its dout, may be NaN. What is
not finite in the dout of another query stays visible in the gradients.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.compat import pl, plgpu
from pallas_kernels.flash_attention import online_softmax as tile_math
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

PROGRAMS = 1056  # eight for each multiprocessor of a Hopper GPU, as some have little to do


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
    delta = tile_math.row_products(dout, out)
    return gradients(q, k, v, sight, lse, delta, dout, job)


def gradients(q, k, v, sight, lse, delta, dout, job):
    """The gradients of attention with weights exp(logits - lse), not necessarily of sum 1.

    Args:
      q: float[b s n h] queries.
      k: float[b t k h] keys.
      v: float[b t k h] values.
      sight: what each query sees; without blocks.
      lse: float32[b s n]; -inf for a query that sees nothing, infinity for weights of 0.
      delta: float32[b s n], what is taken off <dout, v> in the gradient of the softmax.
      dout: float[b s n h].
      job: which operation this is.

    Returns:
      dq, dk, dv in the shapes and dtypes of q, k, v.
    """
    live = ~jnp.isneginf(lse)
    # exp2(finite - inf) is 0: a query that sees nothing weighs nothing.
    base = jnp.where(live, lse * tile_math.LOG2E, jnp.inf)
    stats = tuple(jnp.swapaxes(x, 1, 2) for x in (base, jnp.where(live, delta, 0)))
    arrays = q, dout.astype(q.dtype), k, v
    return _query_gradient(arrays, sight, stats, job), *_key_gradients(arrays, sight, stats, job)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How one kernel is cut.

    Attributes:
      rows: queries of a tile.
      keys: keys of a tile.
      group: heads per KV head.
      splits: programs that share the visits of a tile.
    """

    rows: int
    keys: int
    group: int
    splits: int


def _query_gradient(arrays, sight, stats, job):
    """dq [b s n h]: the grid is (tiles of queries, heads, rows of the batch x splits)."""
    q, _, k, _ = arrays
    b, s, n, h = q.shape
    t, heads = k.shape[1:3]
    params = sizes("attention_dq", q)
    rows = min(max(pl.next_power_of_2(s), LEAST_ROWS), params.rows)
    count = -(-s // rows)
    reach = t if job.reach is None else min(job.reach + rows, t)
    cut = _Cut(rows, params.keys, n // heads, _splits(count * n * b, reach // params.keys))
    visits = Visits.plan(sight, t, queries=min(rows, s), keys=params.keys)
    schedule = _schedule(visits)
    wide = pl.next_power_of_2(h)

    def place(index):
        """A block's place; the last tiles first, which see the most keys if attention is causal."""
        return lambda i, head, z: (jax.lax.div(z, cut.splits), *index(count - 1 - i, head))

    query = pl.BlockSpec((None, rows, None, wide), place(lambda tile, head: (tile, head, 0)))
    stat = pl.BlockSpec((None, None, rows), place(lambda tile, head: (head, tile)))
    limit = pl.BlockSpec((None, rows), place(lambda tile, head: (tile,)))
    whole_keys = pl.BlockSpec(
        (None, t, None, wide), place(lambda tile, head: (0, jax.lax.div(head, cut.group), 0))
    )
    listed = [
        pl.BlockSpec((None, None, x.shape[2]), place(lambda tile, head: (tile, 0)))
        for x in schedule
    ]
    key_pos = pl.BlockSpec((None, t), place(lambda tile, head: (0,)))
    run = compat.triton_call(
        functools.partial(_query_kernel, cut=cut, queries=s, width=h, scale=job.scale),
        grid=(count, n, b * cut.splits),
        in_specs=[*listed, limit, limit, stat, stat, key_pos, query, query, whole_keys, whole_keys],
        out_specs=pl.BlockSpec(
            (None, rows, None, wide), lambda i, head, z: (z, count - 1 - i, head, 0)
        ),
        out_shape=_partials(q, cut.splits),
        num_warps=params.num_warps,
        num_stages=params.num_stages,
        interpret=job.interpret,
        name=f"{job.name}_bwd_dq",
    )
    return _total(run(*schedule, *_limits(sight, stats, count * rows), visits.key_pos, *arrays), q)


def _query_kernel(*refs, cut, queries, width, scale):
    """dq of one tile: rows q [m wide] over its key tiles in k, v [t wide]."""
    *schedule, lo, hi, base, delta, key_pos, q, dout, k, v, dq = refs
    tile = pl.num_programs(0) - 1 - pl.program_id(0)
    lo, hi, base, delta = (x[...] for x in (lo, hi, base, delta))
    live = base != jnp.inf
    rows, douts = (load(x, (pl.ds(0, cut.rows),), live, width) for x in (q, dout))

    def add(state, k_tile, v_tile, see):
        logits = tile_math.product(rows, k_tile, 1, 1) * (scale * tile_math.LOG2E)
        weights = tile_math.shown(jnp.exp2(logits - base[:, None]), see)
        dlogits = weights * (tile_math.product(douts, v_tile, 1, 1) - delta[:, None])
        return state + tile_math.product(dlogits.astype(k_tile.dtype), k_tile, 1, 0)

    def whole(number, _, state):
        at = (pl.ds(number * cut.keys, cut.keys),)
        return add(state, *(load(x, at, None, width) for x in (k, v)), None)

    def part(number, _, state):
        at = (pl.ds(number * cut.keys, cut.keys),)
        inside = number * cut.keys + jnp.arange(cut.keys) < key_pos.shape[0]
        pos = plgpu.load(key_pos.at[at], mask=inside, other=-1)
        see = (lo[:, None] <= pos[None]) & (pos[None] < hi[:, None])
        # 0 in place of the keys that nobody sees: they may be NaN, which a weight of 0 would keep.
        return add(state, *(load(x, at, pos >= 0, width) for x in (k, v)), see)

    split = jax.lax.rem(pl.program_id(2), cut.splits)
    state = walk(schedule, (whole, part), jnp.zeros(rows.shape), split=split, splits=cut.splits)
    store(dq, state * scale, tile * cut.rows + jnp.arange(cut.rows) < queries, width)


def _key_gradients(arrays, sight, stats, job):
    """dk, dv [b t k h]: the grid is (tiles of keys, KV heads, rows of the batch x splits)."""
    q, _, k, v = arrays
    b, s, n, h = q.shape
    t, heads = k.shape[1:3]
    group = n // heads
    params = sizes("attention_dkv", q)
    rows = min(max(pl.next_power_of_2(s), LEAST_ROWS), params.rows)
    keys, count, filled = params.keys, -(-t // params.keys), -(-s // rows) * rows
    reach = s if job.reach is None else min(job.reach + keys, s)
    cut = _Cut(rows, keys, group, _splits(count * heads * b, group * -(-reach // rows)))
    visits = Visits.plan_by_key(sight, t, queries=min(rows, s), keys=keys)
    schedule = _schedule(visits)
    in_specs, out_spec = _key_specs(cut, schedule, q.shape, filled)
    run = compat.triton_call(
        functools.partial(_key_kernel, cut=cut, count=t, width=h, scale=job.scale),
        grid=(count, heads, b * cut.splits),
        in_specs=in_specs,
        out_specs=(out_spec, out_spec),
        out_shape=tuple(_partials(x, cut.splits) for x in (k, v)),
        num_warps=params.num_warps,
        num_stages=params.num_stages,
        interpret=job.interpret,
        name=f"{job.name}_bwd_dkv",
    )
    places = per_tile(visits.key_pos, count * keys, -1)
    dk, dv = run(*schedule, *_limits(sight, stats, filled), places, *arrays)
    return _total(dk, k), _total(dv, v)


def _key_specs(cut, schedule, q_shape, filled):
    """What each program sees of the inputs and outputs: its keys, and all queries of a group."""
    wide = pl.next_power_of_2(q_shape[3])

    def spec(block, index):
        def place(tile, head, z):
            return jax.lax.div(z, cut.splits), *index(tile, head)

        return pl.BlockSpec((None, *block), place)

    lists = [spec((None, x.shape[2]), lambda tile, head: (tile, 0)) for x in schedule]
    limit = spec((filled,), lambda tile, head: (0,))
    stat = spec((cut.group, filled), lambda tile, head: (head, 0))
    key_pos = spec((cut.keys,), lambda tile, head: (tile,))
    queries = spec((q_shape[1], cut.group, wide), lambda tile, head: (0, head, 0))
    key = (cut.keys, None, wide), lambda tile, head: (tile, head, 0)
    in_specs = [*lists, limit, limit, stat, stat, key_pos, queries, queries, spec(*key), spec(*key)]
    return in_specs, pl.BlockSpec((None, *key[0]), lambda tile, head, z: (z, tile, head, 0))


def _key_kernel(*refs, cut, count, width, scale):
    """dk and dv of one tile: keys [m wide] over its query tiles in q, dout [s group wide].

    Logits are held with keys on rows, [m rows].
    """
    *schedule, lo, hi, base, delta, key_pos, q, dout, k, v, dk, dv = refs
    pos = key_pos[...]
    k_tile, v_tile = (load(x, (pl.ds(0, cut.keys),), pos >= 0, width) for x in (k, v))

    def add(number, member, state, *, is_whole):
        at = pl.ds(number * cut.rows, cut.rows)
        bases, deltas = base[member, at], delta[member, at]
        live = bases != jnp.inf
        rows, douts = (load(x, (at, member), live, width) for x in (q, dout))
        see = None
        if not is_whole:
            see = (lo[at][None] <= pos[:, None]) & (pos[:, None] < hi[at][None])
        logits = tile_math.product(k_tile, rows, 1, 1) * (scale * tile_math.LOG2E)
        weights = tile_math.shown(jnp.exp2(logits - bases[None]), see)
        dlogits = weights * (tile_math.product(v_tile, douts, 1, 1) - deltas[None])
        dkey = tile_math.product(dlogits.astype(rows.dtype), rows, 1, 0)
        dvalue = tile_math.product(weights.astype(rows.dtype), douts, 1, 0)
        return state[0] + dkey, state[1] + dvalue

    steps = functools.partial(add, is_whole=True), functools.partial(add, is_whole=False)
    zeros = jnp.zeros(k_tile.shape)
    split = jax.lax.rem(pl.program_id(2), cut.splits)
    dkeys, dvalues = walk(
        schedule, steps, (zeros, zeros), split=split, splits=cut.splits, repeat=cut.group
    )
    exists = pl.program_id(0) * cut.keys + jnp.arange(cut.keys) < count
    store(dk, dkeys * scale, exists, width)
    store(dv, dvalues, exists, width)


def _splits(programs, visits):
    """Programs that share the visits of a tile, where so many tiles visit so many at most."""
    return max(min(PROGRAMS // programs, visits // LEAST_VISITS), 1)


def _schedule(visits):
    return [visits.spans] if visits.ids is None else [visits.spans, visits.ids]


def _limits(sight, stats, count):
    """lo, hi [b count], base and delta [b n count]: rows that fill the last tile see nothing."""
    base, delta = stats
    filled = (jnp.maximum(sight.lo, 0), 0), (sight.hi, 0), (base, jnp.inf), (delta, 0)
    return [per_tile(x, count, fill) for x, fill in filled]


def _partials(x, splits):
    """What the programs write for the gradient of x [b ...]: [b*splits ...]."""
    dtype = x.dtype if splits == 1 else jnp.float32
    return jax.ShapeDtypeStruct((x.shape[0] * splits, *x.shape[1:]), dtype)


def _total(partials, x):
    """The sum of the programs' results, in the shape and dtype of x."""
    if partials.shape == x.shape:
        return partials
    return partials.reshape(x.shape[0], -1, *x.shape[1:]).sum(1).astype(x.dtype)
