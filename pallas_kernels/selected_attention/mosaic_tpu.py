"""`selected_attention` on TPUs: a tile of queries walks the union of its queries' blocks.

The keys and values of one KV head lie in VMEM, as many as fit, while the tiles pass: every visit of
a block is a slice. Where they do not fit, the tiles pass once per range of keys, and each pass goes
on from the result and the lse of the one before. As on GPUs, masked weights are exactly 0, and only
the last blocks of a list compare positions.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes import tpu as tpu_sizes
from pallas_kernels.block_sizes.tpu import LANES
from pallas_kernels.flash_attention.mosaic_tpu_pipeline import flat, product
from pallas_kernels.selected_attention import mosaic_tpu_bwd as mosaic_backward
from pallas_kernels.selected_attention import mosaic_tpu_tiles as tile

FLOOR = float(jnp.finfo(jnp.float32).min)  # of the running maximum; -inf would need guards


def selected_attention(q, k, v, blocks, pos, *, scale, interpret):
    """See `api.py`."""
    return _selected(q, k, v, blocks, pos, scale, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnames=("scale", "interpret"))
def _selected(q, k, v, blocks, pos, scale, interpret):
    return forward(q, k, v, blocks, pos, scale=scale, interpret=interpret)[0]


def _selected_fwd(q, k, v, blocks, pos, scale, interpret):
    out, lse = forward(q, k, v, blocks, pos, scale=scale, interpret=interpret)
    return out, (q, k, v, blocks, pos, out, lse)


def _selected_bwd(scale, interpret, residuals, dout):
    grads = mosaic_backward.backward(residuals, dout, scale=scale, interpret=interpret)
    return *grads, None, None


_selected.defvjp(_selected_fwd, _selected_bwd)


def forward(q, k, v, blocks, pos, *, scale, interpret):
    """Arguments as in `api.py` -> out float[b s n h] and lse float32[b s n]; -inf for none."""
    b, s = q.shape[:2]
    t, heads = k.shape[1:3]
    cut = tile.Cut.of(q, k, blocks.block, backward=False)
    schedule = tile.Schedule.plan(cut, blocks, pos, t)
    tiles = -(-s // cut.queries)
    queries = flat(q, tiles * cut.queries)
    keys, values = (flat(x, cut.ranges * cut.span) for x in (k, v))
    lse_shape = jax.ShapeDtypeStruct((b, heads, tiles, 1, cut.lanes), jnp.float32)
    state, state_specs = (), []
    for i in range(cut.ranges):
        lists, list_specs = schedule.inputs(cut, i)
        dtype = q.dtype if i + 1 == cut.ranges else jnp.float32
        state = compat.mosaic_call(
            functools.partial(_attend_tile, cut=cut, begin=i * cut.span // cut.block, scale=scale),
            grid=(b, heads, tiles),
            in_specs=[
                *list_specs,
                tile.query_spec(cut),
                *[tile.key_spec(cut, i)] * 2,
                *state_specs,
            ],
            out_specs=[tile.query_spec(cut), tile.row_spec(cut)],
            out_shape=[jax.ShapeDtypeStruct(queries.shape, dtype), lse_shape],
            scratch_shapes=[schedule.scratch(cut)],
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tpu_sizes.pick(compat.device_kind()).vmem,
            interpret=interpret,
            name="selected_attention_fwd",
        )(*lists, queries, keys, values, *state)
        state_specs = [tile.query_spec(cut), tile.row_spec(cut)]
    out, lse = state
    return tile.unflat(out, q.shape), tile.heads_of(lse, cut, s)


def _attend_tile(*refs, cut, begin, scale):
    """One tile of one KV head, over one range of keys, going on from the state of the one before.

    The weighted sum is held transposed, as [LANES lanes].
    """
    *schedule, q, k, v = refs[:7]
    *before, out, lse, words = refs[7:]
    rows = tile.load_rows(q, cut)

    def step(state, keys, values, see, _):
        top, total, acc = state
        logits = jnp.where(see, product(keys, rows, 1, 1) * scale, FLOOR)
        new_top = jnp.maximum(top, logits.max(0, keepdims=True))
        weights = jnp.where(see, jnp.exp(logits - new_top), 0.0)
        decay = jnp.exp(top - new_top)
        acc = acc * decay + product(values, weights.astype(values.dtype), 0, 0)
        return new_top, total * decay + weights.sum(0, keepdims=True), acc

    if before:
        acc = tile.load_rows(before[0], cut).T
        seen = before[1][...] > -jnp.inf
        top, total = jnp.where(seen, before[1][...], FLOOR), jnp.where(seen, 1.0, 0.0)
    else:
        top = jnp.full((1, cut.lanes), FLOOR)
        total, acc = jnp.zeros((1, cut.lanes)), jnp.zeros((LANES, cut.lanes))
    top, total, acc = tile.walk(schedule, words, k, v, cut, begin, step, (top, total, acc))
    safe = jnp.where(total == 0, 1.0, total)
    tile.store_rows(out, (acc / safe).T, cut)
    lse[...] = jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))
