"""`selected_attention` on NVIDIA GPUs: a tile of queries visits the union of its queries' blocks.

A query alone would use each of its blocks for the few rows of one group. So a program takes some
consecutive queries times the heads of a group, fetches every block that any of them chose once, and
masks the rows whose query did not choose it: exact, because a masked weight is 0. The list is
ascending; only its last blocks can reach past a query, and only they compare positions.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.compat import plgpu
from pallas_kernels.flash_attention import online_softmax
from pallas_kernels.flash_attention.attention_kernels import AttentionKernels
from pallas_kernels.selected_attention import triton_bwd, triton_tiles


def forward(q, k, v, sees, config, gated=()):
    """See `AttentionKernels`.

    Args:
      q: float[b s n h] queries.
      k: float[b t k h] keys.
      v: float[b t k h] values.
      sees: `ChosenKeys`.
      config: what is static.
      gated: empty, or gates float[b s n 3] of the branches compressed, selected and window, and the
        outputs float[b s n h] of the compressed and of the window branch. Then the result is the
        sum of gate x branch, and the selected branch is never written; lse is the selected
        branch's all the same.
    """
    run = triton_tiles.Launch.of("selected_attention", q, k, sees).kernel(
        functools.partial(_attend_tile, scale=config.scale),
        "combined_attention_fwd" if gated else "selected_attention_fwd",
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ),
        interpret=config.interpret,
    )
    return run(q, k, v, *gated)


KERNELS = AttentionKernels(forward, triton_bwd.backward)


def _attend_tile(*refs, dims, scale):
    """One tile of one KV head."""
    *schedule, q, k, v = refs[:8]
    *gated, out, lse = refs[8:]
    tile = triton_tiles.tile_of(schedule, q, k, dims)
    rows = triton_tiles.load_rows(q, tile.where, tile.live)

    def step(state, keys, values, see):
        logits = online_softmax.product(rows, keys, 1, 1) * (scale * online_softmax.LOG2E)
        return online_softmax.add_keys(state, jnp.where(see, logits, -jnp.inf), values)

    count = rows.shape[0]
    state = jnp.full(count, -jnp.inf), jnp.zeros(count), jnp.zeros(rows.shape)
    m, l, o = triton_tiles.kv_loop(schedule, tile, k, v, dims, step, state)
    safe = jnp.where(l == 0, 1.0, l)
    o = o / safe[:, None]
    if gated:
        o = _combine(o, *gated, tile)
    plgpu.store(triton_tiles.rows_of(out, tile.where), o.astype(out.dtype), mask=tile.real[:, None])
    value = jnp.where(l == 0, -jnp.inf, (m + jnp.log2(safe)) / online_softmax.LOG2E)
    plgpu.store(lse.at[tile.where], value, mask=tile.real)


def _combine(selected, gates, compressed, window, tile):
    """Sum of gate x branch for rows f32[m h]; 0 where not live."""
    gate = [plgpu.load(gates.at[(*tile.where, i)], mask=tile.live, other=0) for i in range(3)]
    others = (
        triton_tiles.load_rows(x, tile.where, tile.live).astype(jnp.float32)
        for x in (compressed, window)
    )
    terms = zip(gate, (next(others), selected, next(others)), strict=True)
    return sum(x.astype(jnp.float32)[:, None] * branch for x, branch in terms)
