"""The gradients of `triton.forward`, by two kernels that recompute the weights from lse.

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
from pallas_kernels.flash_attention import online_softmax
from pallas_kernels.flash_attention.tile_schedule import TileSchedule
from pallas_kernels.flash_attention.triton_loop import (
    LEAST_ROWS,
    LEAST_VISITS,
    load,
    per_tile,
    store,
    tile_loop,
    tuning,
)

PROGRAMS = 1056  # eight for each multiprocessor of a Hopper GPU, as some have little to do


def backward(residuals, dout, config):
    """See `AttentionKernels`."""
    q, k, v, mask, out, lse = residuals
    delta = online_softmax.row_products(dout, out)
    return gradients(q, k, v, mask, lse, delta, dout, config)


def gradients(q, k, v, mask, lse, delta, dout, config):
    """The gradients of attention with weights exp(logits - lse), not necessarily of sum 1.

    Args:
      q: float[b s n h] queries.
      k: float[b t k h] keys.
      v: float[b t k h] values.
      mask: what each query sees; without blocks.
      lse: float32[b s n]; -inf for a query that sees nothing, infinity for weights of 0.
      delta: float32[b s n], what is taken off <dout, v> in the gradient of the softmax.
      dout: float[b s n h].
      config: what is static.

    Returns:
      dq, dk, dv in the shapes and dtypes of q, k, v.
    """
    live = ~jnp.isneginf(lse)
    # exp2(finite - inf) is 0: a query that sees nothing weighs nothing.
    base = jnp.where(live, lse * online_softmax.LOG2E, jnp.inf)
    stats = tuple(jnp.swapaxes(x, 1, 2) for x in (base, jnp.where(live, delta, 0)))
    arrays = q, dout.astype(q.dtype), k, v
    dq = _query_gradient(arrays, mask, stats, config)
    return dq, *_key_gradients(arrays, mask, stats, config)


@dataclasses.dataclass(frozen=True)
class _GridDims:
    """How one kernel is cut.

    Attributes:
      block_q: queries of a tile.
      block_kv: keys of a tile.
      group: heads per KV head.
      num_splits: programs that share the visits of a tile.
    """

    block_q: int
    block_kv: int
    group: int
    num_splits: int


def _query_gradient(arrays, mask, stats, config):
    """dq [b s n h]: the grid is (tiles of queries, heads, rows of the batch x splits)."""
    q, _, k, _ = arrays
    b, s, n, h = q.shape
    t, heads = k.shape[1:3]
    params = tuning("attention_dq", q)
    block_q = min(max(pl.next_power_of_2(s), LEAST_ROWS), params.block_q)
    count, block_kv = -(-s // block_q), params.block_kv
    near = t if config.max_distance is None else min(config.max_distance + block_q, t)
    num_splits = _num_splits(count * n * b, near // block_kv)
    dims = _GridDims(block_q, block_kv, n // heads, num_splits)
    schedule = TileSchedule.by_query(mask, t, block_q=min(block_q, s), block_kv=block_kv)
    wide = pl.next_power_of_2(h)

    def place(index):
        """A block's place; the last tiles first, which see the most keys if attention is causal."""
        return lambda i, head, z: (jax.lax.div(z, dims.num_splits), *index(count - 1 - i, head))

    query = pl.BlockSpec((None, block_q, None, wide), place(lambda tile, head: (tile, head, 0)))
    stat = pl.BlockSpec((None, None, block_q), place(lambda tile, head: (head, tile)))
    limit = pl.BlockSpec((None, block_q), place(lambda tile, head: (tile,)))
    all_keys = pl.BlockSpec(
        (None, t, None, wide), place(lambda tile, head: (0, jax.lax.div(head, dims.group), 0))
    )
    listed = [
        pl.BlockSpec((None, None, x.shape[2]), place(lambda tile, head: (tile, 0)))
        for x in schedule.arrays
    ]
    key_pos = pl.BlockSpec((None, t), place(lambda tile, head: (0,)))
    run = compat.triton_call(
        functools.partial(_query_kernel, dims=dims, queries=s, width=h, scale=config.scale),
        grid=(count, n, b * dims.num_splits),
        in_specs=[*listed, limit, limit, stat, stat, key_pos, query, query, all_keys, all_keys],
        out_specs=pl.BlockSpec(
            (None, block_q, None, wide), lambda i, head, z: (z, count - 1 - i, head, 0)
        ),
        out_shape=_partials(q, dims.num_splits),
        num_warps=params.num_warps,
        num_stages=params.num_stages,
        interpret=config.interpret,
        name=f"{config.name}_bwd_dq",
    )
    limits = _limits(mask, stats, count * block_q)
    return _total(run(*schedule.arrays, *limits, schedule.key_pos, *arrays), q)


def _query_kernel(*refs, dims, queries, width, scale):
    """dq of one tile: rows q [m wide] over its key tiles in k, v [t wide]."""
    *schedule, lo, hi, base, delta, key_pos, q, dout, k, v, dq = refs
    tile = pl.num_programs(0) - 1 - pl.program_id(0)
    lo, hi, base, delta = (x[...] for x in (lo, hi, base, delta))
    live = base != jnp.inf
    rows, douts = (load(x, (pl.ds(0, dims.block_q),), live, width) for x in (q, dout))

    def add(state, k_tile, v_tile, see):
        logits = online_softmax.product(rows, k_tile, 1, 1) * (scale * online_softmax.LOG2E)
        weights = online_softmax.shown(jnp.exp2(logits - base[:, None]), see)
        dlogits = weights * (online_softmax.product(douts, v_tile, 1, 1) - delta[:, None])
        return state + online_softmax.product(dlogits.astype(k_tile.dtype), k_tile, 1, 0)

    def full(number, _, state):
        at = (pl.ds(number * dims.block_kv, dims.block_kv),)
        return add(state, *(load(x, at, None, width) for x in (k, v)), None)

    def partial(number, _, state):
        at = (pl.ds(number * dims.block_kv, dims.block_kv),)
        inside = number * dims.block_kv + jnp.arange(dims.block_kv) < key_pos.shape[0]
        pos = plgpu.load(key_pos.at[at], mask=inside, other=-1)
        see = (lo[:, None] <= pos[None]) & (pos[None] < hi[:, None])
        # 0 in place of the keys that nobody sees: they may be NaN, which a weight of 0 would keep.
        return add(state, *(load(x, at, pos >= 0, width) for x in (k, v)), see)

    split = jax.lax.rem(pl.program_id(2), dims.num_splits)
    zeros = jnp.zeros(rows.shape)
    state = tile_loop(schedule, (full, partial), zeros, split=split, num_splits=dims.num_splits)
    store(dq, state * scale, tile * dims.block_q + jnp.arange(dims.block_q) < queries, width)


def _key_gradients(arrays, mask, stats, config):
    """dk, dv [b t k h]: the grid is (tiles of keys, KV heads, rows of the batch x splits)."""
    q, _, k, v = arrays
    b, s, n, h = q.shape
    t, heads = k.shape[1:3]
    group = n // heads
    params = tuning("attention_dkv", q)
    block_q = min(max(pl.next_power_of_2(s), LEAST_ROWS), params.block_q)
    block_kv, filled = params.block_kv, -(-s // block_q) * block_q
    count = -(-t // block_kv)
    near = s if config.max_distance is None else min(config.max_distance + block_kv, s)
    num_splits = _num_splits(count * heads * b, group * -(-near // block_q))
    dims = _GridDims(block_q, block_kv, group, num_splits)
    schedule = TileSchedule.by_key(mask, t, block_q=min(block_q, s), block_kv=block_kv)
    in_specs, out_spec = _key_specs(dims, schedule.arrays, q.shape, filled)
    run = compat.triton_call(
        functools.partial(_key_kernel, dims=dims, count=t, width=h, scale=config.scale),
        grid=(count, heads, b * dims.num_splits),
        in_specs=in_specs,
        out_specs=(out_spec, out_spec),
        out_shape=tuple(_partials(x, dims.num_splits) for x in (k, v)),
        num_warps=params.num_warps,
        num_stages=params.num_stages,
        interpret=config.interpret,
        name=f"{config.name}_bwd_dkv",
    )
    places = per_tile(schedule.key_pos, count * block_kv, -1)
    dk, dv = run(*schedule.arrays, *_limits(mask, stats, filled), places, *arrays)
    return _total(dk, k), _total(dv, v)


def _key_specs(dims, schedule, q_shape, filled):
    """What each program sees of the inputs and outputs: its keys, and all queries of a group."""
    wide = pl.next_power_of_2(q_shape[3])

    def spec(block, index):
        def place(tile, head, z):
            return jax.lax.div(z, dims.num_splits), *index(tile, head)

        return pl.BlockSpec((None, *block), place)

    lists = [spec((None, x.shape[2]), lambda tile, head: (tile, 0)) for x in schedule]
    limit = spec((filled,), lambda tile, head: (0,))
    stat = spec((dims.group, filled), lambda tile, head: (head, 0))
    key_pos = spec((dims.block_kv,), lambda tile, head: (tile,))
    queries = spec((q_shape[1], dims.group, wide), lambda tile, head: (0, head, 0))
    key = (dims.block_kv, None, wide), lambda tile, head: (tile, head, 0)
    in_specs = [*lists, limit, limit, stat, stat, key_pos, queries, queries, spec(*key), spec(*key)]
    return in_specs, pl.BlockSpec((None, *key[0]), lambda tile, head, z: (z, tile, head, 0))


def _key_kernel(*refs, dims, count, width, scale):
    """dk and dv of one tile: keys [m wide] over its query tiles in q, dout [s group wide].

    Logits are held with keys on rows, [m rows].
    """
    *schedule, lo, hi, base, delta, key_pos, q, dout, k, v, dk, dv = refs
    pos = key_pos[...]
    k_tile, v_tile = (load(x, (pl.ds(0, dims.block_kv),), pos >= 0, width) for x in (k, v))

    def add(number, member, state, *, is_full):
        at = pl.ds(number * dims.block_q, dims.block_q)
        bases, deltas = base[member, at], delta[member, at]
        live = bases != jnp.inf
        rows, douts = (load(x, (at, member), live, width) for x in (q, dout))
        see = None
        if not is_full:
            see = (lo[at][None] <= pos[:, None]) & (pos[:, None] < hi[at][None])
        logits = online_softmax.product(k_tile, rows, 1, 1) * (scale * online_softmax.LOG2E)
        weights = online_softmax.shown(jnp.exp2(logits - bases[None]), see)
        dlogits = weights * (online_softmax.product(v_tile, douts, 1, 1) - deltas[None])
        dkey = online_softmax.product(dlogits.astype(rows.dtype), rows, 1, 0)
        dvalue = online_softmax.product(weights.astype(rows.dtype), douts, 1, 0)
        return state[0] + dkey, state[1] + dvalue

    steps = functools.partial(add, is_full=True), functools.partial(add, is_full=False)
    zeros = jnp.zeros(k_tile.shape)
    split = jax.lax.rem(pl.program_id(2), dims.num_splits)
    dkeys, dvalues = tile_loop(
        schedule,
        steps,
        (zeros, zeros),
        split=split,
        num_splits=dims.num_splits,
        repeat=dims.group,
    )
    exists = pl.program_id(0) * dims.block_kv + jnp.arange(dims.block_kv) < count
    store(dk, dkeys * scale, exists, width)
    store(dv, dvalues, exists, width)


def _num_splits(programs, visits):
    """Programs that share the visits of a tile, where so many tiles visit so many at most."""
    return max(min(PROGRAMS // programs, visits // LEAST_VISITS), 1)


def _limits(mask, stats, count):
    """lo, hi [b count], base and delta [b n count]: rows that fill the last tile see nothing."""
    base, delta = stats
    filled = (jnp.maximum(mask.lo, 0), 0), (mask.hi, 0), (base, jnp.inf), (delta, 0)
    return [per_tile(x, count, fill) for x, fill in filled]


def _partials(x, num_splits):
    """What the programs write for the gradient of x [b ...]: [b*num_splits ...]."""
    dtype = x.dtype if num_splits == 1 else jnp.float32
    return jax.ShapeDtypeStruct((x.shape[0] * num_splits, *x.shape[1:]), dtype)


def _total(partials, x):
    """The sum of the programs' results, in the shape and dtype of x."""
    if partials.shape == x.shape:
        return partials
    return partials.reshape(x.shape[0], -1, *x.shape[1:]).sum(1).astype(x.dtype)
