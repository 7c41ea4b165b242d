"""Attention under a `KeyRangeMask` on NVIDIA GPUs.

A program takes a tile of queries of one head, visits the key tiles of its schedule and keeps the
softmax statistics in float32: first the full tiles, without a mask, then the partial ones. Where
the queries are few, the heads of a group become queries, so that keys are read once per
group, and several programs share the keys of a tile; their results are merged by lse in a fixed
order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.compat import pl, plgpu
from pallas_kernels.flash_attention import online_softmax, triton_bwd
from pallas_kernels.flash_attention.attention_kernels import AttentionKernels
from pallas_kernels.flash_attention.gqa_packing import pack_gqa, unpack_gqa
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

PROGRAMS = 264  # to keep a Hopper GPU busy: two for each of its 132 multiprocessors


def forward(q, k, v, mask, config):
    """See `AttentionKernels`; the mask is one without blocks."""
    s, heads = q.shape[1], k.shape[2]
    group = q.shape[2] // heads
    if group == 1 or s * group > tuning("decode_attention", q).block_q:
        return _launch(q, k, v, mask, "fwd", config)
    packed = pack_gqa(q, heads)
    return unpack_gqa(*_launch(packed, k, v, mask, "decode", config), q.shape)


KERNELS = AttentionKernels(forward, triton_bwd.backward)


@dataclasses.dataclass(frozen=True)
class _GridDims:
    """Programs of one launch: the grid is (tiles, heads, rows of the batch x splits).

    Attributes:
      block_q: rows of a tile.
      tiles: tiles per head.
      num_splits: programs that share the keys of a tile.
      group: heads per KV head.
    """

    block_q: int
    tiles: int
    num_splits: int
    group: int


def _launch(q, k, v, mask, kernel, config):
    """Runs the kernel: out, lse of q [b s n h]; each query of the mask has s // queries rows."""
    b, s, n, h = q.shape
    t, heads = k.shape[1:3]
    queries = mask.lo.shape[1]
    params = tuning("decode_attention" if kernel == "decode" else config.name, q)
    block_q = min(max(pl.next_power_of_2(s), LEAST_ROWS), params.block_q)
    count = -(-s // block_q)
    near = t if config.max_distance is None else min(config.max_distance + block_q, t)
    splits = min(PROGRAMS // (count * n * b), near // (params.block_kv * LEAST_VISITS))
    dims = _GridDims(block_q, count, max(splits, 1), n // heads)

    def per_row(x):
        """i32[b queries] -> i32[b tiles*block_q]; rows that fill the last tile see nothing."""
        return per_tile(jnp.repeat(x, s // queries, axis=1), count * block_q, 0)

    schedule = TileSchedule.by_query(
        mask, t, block_q=min(block_q, queries), block_kv=params.block_kv
    )
    in_specs, out_specs = _specs(dims, schedule.arrays, k.shape)
    partial_dtype = q.dtype if dims.num_splits == 1 else jnp.float32
    out, lse = compat.triton_call(
        functools.partial(
            _kernel,
            dims=dims,
            queries=s,
            block_kv=params.block_kv,
            width=h,
            scale=config.scale * online_softmax.LOG2E,
        ),
        grid=(count, n, b * dims.num_splits),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=(
            jax.ShapeDtypeStruct((b * dims.num_splits, s, n, h), partial_dtype),
            jax.ShapeDtypeStruct((b * dims.num_splits, s, n), jnp.float32),
        ),
        num_warps=params.num_warps,
        num_stages=params.num_stages,
        interpret=config.interpret,
        name=f"{config.name}_{kernel}",
    )(
        *schedule.arrays,
        per_row(jnp.maximum(mask.lo, 0)),
        per_row(mask.hi),
        schedule.key_pos,
        q,
        k,
        v,
    )
    return (out, lse) if dims.num_splits == 1 else _merge(out, lse, dims.num_splits, q.dtype)


def _specs(dims, schedule, k_shape):
    """What each program sees of the inputs and outputs: heads filled up to a power of two."""
    t, wide = k_shape[1], pl.next_power_of_2(k_shape[3])

    def spec(block, index, *, per_split=False):
        def place(i, head, z):
            row = z if per_split else jax.lax.div(z, dims.num_splits)
            return row, *index(_tile(i, dims), head)

        return pl.BlockSpec((None, *block), place)

    query = (dims.block_q, None, wide), lambda tile, head: (tile, head, 0)
    stats = (dims.block_q, None), lambda tile, head: (tile, head)
    limit = spec((dims.block_q,), lambda tile, head: (tile,))
    keys = spec((t, None, wide), lambda tile, head: (0, jax.lax.div(head, dims.group), 0))
    lists = [spec((None, x.shape[2]), lambda tile, head: (tile, 0)) for x in schedule]
    key_pos = spec((t,), lambda tile, head: (0,))
    in_specs = [*lists, limit, limit, key_pos, spec(*query), keys, keys]
    return in_specs, (spec(*query, per_split=True), spec(*stats, per_split=True))


def _tile(i, dims):
    """The tile of program i: the last first, which see the most keys where attention is causal."""
    return dims.tiles - 1 - i


def _merge(out, lse, num_splits, dtype):
    """Joins the results [b*num_splits s n ..] over disjoint sets of keys."""
    out, lse = (x.reshape(-1, num_splits, *x.shape[1:]) for x in (out, lse))
    m = online_softmax.finite(lse.max(1))
    weights = jnp.exp(lse - m[:, None])
    l = weights.sum(1)
    safe = jnp.where(l == 0, 1.0, l)
    out = (out * weights[..., None]).sum(1) / safe[..., None]
    return out.astype(dtype), jnp.where(l == 0, -jnp.inf, m + jnp.log(safe))


def _kernel(*refs, dims, queries, block_kv, width, scale):
    """One tile: its rows q [m wide] over its key tiles in k, v [t wide]; exponents are of 2.

    Of the columns `width` exist, of the rows those of `queries` queries.
    """
    *schedule, lo, hi, key_pos, q, k, v, out, lse = refs
    lo, hi = lo[...], hi[...]
    live = hi > lo
    block_q = lo.shape[0]
    rows = load(q, (pl.ds(0, block_q),), live, width)

    def full(number, _, state):
        at = (pl.ds(number * block_kv, block_kv),)
        k_tile, v_tile = (load(x, at, None, width) for x in (k, v))
        logits = online_softmax.product(rows, k_tile, 1, 1) * scale
        return online_softmax.add_keys(state, logits, v_tile)

    def partial(number, _, state):
        at = (pl.ds(number * block_kv, block_kv),)
        inside = number * block_kv + jnp.arange(block_kv) < key_pos.shape[0]
        pos = plgpu.load(key_pos.at[at], mask=inside, other=-1)
        # 0 in place of the keys that nobody sees: they may be NaN, which a weight of 0 would keep.
        k_tile, v_tile = (load(x, at, pos >= 0, width) for x in (k, v))
        see = (lo[:, None] <= pos[None]) & (pos[None] < hi[:, None])
        logits = online_softmax.product(rows, k_tile, 1, 1) * scale
        return online_softmax.add_keys(state, jnp.where(see, logits, -jnp.inf), v_tile)

    state = jnp.full(block_q, -jnp.inf), jnp.zeros(block_q), jnp.zeros(rows.shape)
    split = jax.lax.rem(pl.program_id(2), dims.num_splits)
    state = tile_loop(schedule, (full, partial), state, split=split, num_splits=dims.num_splits)
    exists = _tile(pl.program_id(0), dims) * block_q + jnp.arange(block_q) < queries
    _store(state, live, exists, width, out, lse)


def _store(state, live, exists, width, out, lse):
    """Writes the rows that exist; 0 and -inf where a query sees nothing."""
    m, l, o = state
    some = live & (l != 0)
    safe = jnp.where(some, l, 1.0)
    store(out, jnp.where(some[:, None], o / safe[:, None], 0.0), exists, width)
    value = jnp.where(some, m / online_softmax.LOG2E + jnp.log(safe), -jnp.inf)
    plgpu.store(lse, value, mask=exists)
