"""`selected_attention` on TPUs: a tile of queries visits the union of its queries' blocks.

The keys and values of one KV head lie in VMEM, as many as fit, while the tiles pass: every visit of
a block is a slice. Where they do not fit, the tiles pass once per range of keys, and each pass goes
on from the result and the lse of the one before. As on GPUs, masked weights are exactly 0, and only
the last blocks of a list compare positions.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes import tpu as block_sizes
from pallas_kernels.block_sizes.tpu import LANES
from pallas_kernels.flash_attention.attention_kernels import AttentionKernels
from pallas_kernels.selected_attention import mosaic_tpu_bwd
from pallas_kernels.selected_attention import mosaic_tpu_tiles as tile
from pallas_kernels.tpu_layout import flat, product

FLOOR = float(jnp.finfo(jnp.float32).min)  # of the running maximum; -inf would need guards


def forward(q, k, v, sees, config):
    """See `AttentionKernels`; `sees` are `ChosenKeys`."""
    b, s = q.shape[:2]
    t, heads = k.shape[1:3]
    dims = tile.TileDims.of(q, k, sees.blocks.block, backward=False)
    schedule = tile.BlockSchedule.plan(dims, sees, t)
    tiles = -(-s // dims.block_q)
    queries = flat(q, tiles * dims.block_q)
    keys, values = (flat(x, dims.ranges * dims.span) for x in (k, v))
    lse_shape = jax.ShapeDtypeStruct((b, heads, tiles, 1, dims.lanes), jnp.float32)
    state, state_specs = (), []
    for i in range(dims.ranges):
        lists, list_specs = schedule.inputs(dims, i)
        dtype = q.dtype if i + 1 == dims.ranges else jnp.float32
        state = compat.mosaic_call(
            functools.partial(
                _attend_tile, dims=dims, begin=i * dims.span // dims.block, scale=config.scale
            ),
            grid=(b, heads, tiles),
            in_specs=[
                *list_specs,
                tile.query_spec(dims),
                *[tile.key_spec(dims, i)] * 2,
                *state_specs,
            ],
            out_specs=[tile.query_spec(dims), tile.row_spec(dims)],
            out_shape=[jax.ShapeDtypeStruct(queries.shape, dtype), lse_shape],
            scratch_shapes=[schedule.scratch(dims)],
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=block_sizes.pick(compat.device_kind()).vmem,
            interpret=config.interpret,
            name="selected_attention_fwd",
        )(*lists, queries, keys, values, *state)
        state_specs = [tile.query_spec(dims), tile.row_spec(dims)]
    out, lse = state
    return tile.unflat(out, q.shape), tile.heads_of(lse, dims, s)


KERNELS = AttentionKernels(forward, mosaic_tpu_bwd.backward)


def _attend_tile(*refs, dims, begin, scale):
    """One tile of one KV head, over one range of keys, going on from the state of the one before.

    The weighted sum is held transposed, as [LANES lanes].
    """
    *schedule, q, k, v = refs[:7]
    *before, out, lse, words = refs[7:]
    rows = tile.load_rows(q, dims)

    def step(state, keys, values, see, _):
        m, l, o = state
        logits = jnp.where(see, product(keys, rows, 1, 1) * scale, FLOOR)
        new_m = jnp.maximum(m, logits.max(0, keepdims=True))
        weights = jnp.where(see, jnp.exp(logits - new_m), 0.0)
        alpha = jnp.exp(m - new_m)
        o = o * alpha + product(values, weights.astype(values.dtype), 0, 0)
        return new_m, l * alpha + weights.sum(0, keepdims=True), o

    if before:
        o = tile.load_rows(before[0], dims).T
        seen = before[1][...] > -jnp.inf
        m, l = jnp.where(seen, before[1][...], FLOOR), jnp.where(seen, 1.0, 0.0)
    else:
        m = jnp.full((1, dims.lanes), FLOOR)
        l, o = jnp.zeros((1, dims.lanes)), jnp.zeros((LANES, dims.lanes))
    m, l, o = tile.kv_loop(schedule, words, k, v, dims, begin, step, (m, l, o))
    safe = jnp.where(l == 0, 1.0, l)
    tile.store_rows(out, (o / safe).T, dims)
    lse[...] = jnp.where(l == 0, -jnp.inf, m + jnp.log(safe))
