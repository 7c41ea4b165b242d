"""`selected_attention` on NVIDIA GPUs: a tile of queries walks the union of its queries' blocks.

A query alone would use each of its blocks for the few rows of one group. So a program takes some
consecutive queries times the heads of a group, fetches every block that any of them chose once, and
masks the rows whose query did not choose it: exact, because a masked weight is 0. The list is
ascending; only its last blocks can reach past a query, and only they compare positions.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.compat import plgpu
from pallas_kernels.flash_attention import online_softmax as tile_math
from pallas_kernels.selected_attention import triton_bwd as triton_backward
from pallas_kernels.selected_attention import triton_tiles as union_tile


def selected_attention(q, k, v, blocks, pos, *, scale, interpret):
    """See `api.py`."""
    return _selected(q, k, v, blocks, pos, scale, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnames=("scale", "interpret"))
def _selected(q, k, v, blocks, pos, scale, interpret):
    return forward(q, k, v, blocks, pos, (), scale=scale, interpret=interpret)[0]


def _selected_fwd(q, k, v, blocks, pos, scale, interpret):
    out, lse = forward(q, k, v, blocks, pos, (), scale=scale, interpret=interpret)
    return out, (q, k, v, blocks, pos, out, lse)


def _selected_bwd(scale, interpret, residuals, dout):
    grads = triton_backward.backward(residuals, dout, scale=scale, interpret=interpret)
    return *grads, None, None


_selected.defvjp(_selected_fwd, _selected_bwd)


def forward(q, k, v, blocks, pos, gated, *, scale, interpret):
    """The kernel, without a gradient.

    Args:
      q: float[b s n h] queries.
      k: float[b t k h] keys.
      v: float[b t k h] values.
      blocks: a `BlockSet`.
      pos: i32[b s] index of the last key a query may see; -1 for none.
      gated: empty, or gates float[b s n 3] of the branches compressed, selected and window, and the
        outputs float[b s n h] of the compressed and of the window branch. Then the result is the
        sum of gate x branch, and the selected branch is never written.
      scale: factor of the logits.
      interpret: run in the interpreter.

    Returns:
      out float[b s n h], dtype of `q`; 0 where pos is -1. And lse float32[b s n] of the selected
      branch.
    """
    run = union_tile.Plan.of("selected_attention", q, k, blocks, pos).kernel(
        functools.partial(_attend_tile, scale=scale),
        "combined_attention_fwd" if gated else "selected_attention_fwd",
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ),
        interpret=interpret,
    )
    return run(q, k, v, *gated)


def _attend_tile(*refs, cut, scale):
    """One tile of one KV head."""
    *schedule, q, k, v = refs[:8]
    *gated, out, lse = refs[8:]
    tile = union_tile.tile_of(schedule, q, k, cut)
    rows = union_tile.load_rows(q, tile.where, tile.live)

    def step(state, keys, values, see):
        logits = tile_math.product(rows, keys, 1, 1) * (scale * tile_math.LOG2E)
        return tile_math.add_keys(state, jnp.where(see, logits, -jnp.inf), values)

    m = rows.shape[0]
    state = jnp.full(m, -jnp.inf), jnp.zeros(m), jnp.zeros(rows.shape)
    top, total, acc = union_tile.walk(schedule, tile, k, v, cut, step, state)
    safe = jnp.where(total == 0, 1.0, total)
    acc = acc / safe[:, None]
    if gated:
        acc = _combine(acc, *gated, tile)
    plgpu.store(union_tile.rows_of(out, tile.where), acc.astype(out.dtype), mask=tile.real[:, None])
    value = jnp.where(total == 0, -jnp.inf, (top + jnp.log2(safe)) / tile_math.LOG2E)
    plgpu.store(lse.at[tile.where], value, mask=tile.real)


def _combine(selected, gates, compressed, window, tile):
    """Sum of gate x branch for rows f32[m h]; 0 where not live."""
    gate = [plgpu.load(gates.at[(*tile.where, i)], mask=tile.live, other=0) for i in range(3)]
    others = (
        union_tile.load_rows(x, tile.where, tile.live).astype(jnp.float32)
        for x in (compressed, window)
    )
    terms = zip(gate, (next(others), selected, next(others)), strict=True)
    return sum(x.astype(jnp.float32)[:, None] * branch for x, branch in terms)
