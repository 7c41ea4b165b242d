"""`selected_attention` on NVIDIA GPUs: a tile of queries walks the union of its queries' blocks.

A query alone would use each of its blocks for the few rows of one group. So a program takes some
consecutive queries times the heads of a group, fetches every block that any of them chose once, and
masks the rows whose query did not choose it: exact, because a masked weight is 0. The list is
ascending; only its last blocks can reach past a query, and only they compare positions.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat, flash, tile_math, tiles, union
from pallas_kernels.combine import combine
from pallas_kernels.compat import pl, plgpu
from pallas_kernels.schedule import Sight
from pallas_kernels.selected_attention import xla


def selected_attention(q, k, v, blocks, pos, *, scale, interpret):
    """See `api.py`."""
    return _selected(q, k, v, blocks, pos, scale, interpret)


def combined_attention(q, k, v, blocks, pos, gated, *, scale, interpret):
    """`combine` of the three branches, of which the kernel never writes the selected one.

    Differentiated, it does: the gradient of its gate needs it. The result is then rounded twice.

    Args:
      q: float[b s n h] queries.
      k: float[b t k h] keys.
      v: float[b t k h] values.
      blocks: a `BlockSet`.
      pos: i32[b s] index of the last key a query may see; -1 for none.
      gated: gates float[b s n 3] of the branches compressed, selected and window, then the outputs
        float[b s n h] of the compressed and of the window branch.
      scale: factor of the logits.
      interpret: run in the interpreter.

    Returns:
      float[b s n h], dtype of `q`; 0 where pos is -1.
    """
    return _combined(q, k, v, blocks, pos, gated, scale, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnames=("scale", "interpret"))
def _selected(q, k, v, blocks, pos, scale, interpret):
    return _forward(q, k, v, blocks, pos, (), scale, interpret)[0]


def _selected_fwd(q, k, v, blocks, pos, scale, interpret):
    out, lse = _forward(q, k, v, blocks, pos, (), scale, interpret)
    return out, (q, k, v, blocks, pos, out, lse)


def _selected_bwd(scale, interpret, residuals, dout):
    q, k, v, blocks, pos, out, lse = residuals
    sight = Sight(jnp.zeros_like(pos), pos + 1, bits=blocks.bits)
    grads = flash.backward((q, k, v, sight, out, lse), dout, scale, xla.tiles(blocks.block))
    return *grads, None, None


_selected.defvjp(_selected_fwd, _selected_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnames=("scale", "interpret"))
def _combined(q, k, v, blocks, pos, gated, scale, interpret):
    return _forward(q, k, v, blocks, pos, gated, scale, interpret)[0]


def _combined_fwd(q, k, v, blocks, pos, gated, scale, interpret):
    selected, residuals = _selected_fwd(q, k, v, blocks, pos, scale, interpret)
    gates, compressed, window = gated
    return combine(gates, (compressed, selected, window), pos), (residuals, gated)


def _combined_bwd(scale, interpret, residuals, dout):
    residuals, (gates, compressed, window) = residuals
    pos, selected = residuals[4:6]
    pull = jax.vjp(
        lambda gates, *branches: combine(gates, branches, pos), gates, compressed, selected, window
    )[1]
    dgates, dcompressed, dselected, dwindow = pull(dout)
    grads = _selected_bwd(scale, interpret, residuals, dselected)
    return *grads, (dgates, dcompressed, dwindow)


_combined.defvjp(_combined_fwd, _combined_bwd)


def _forward(q, k, v, blocks, pos, gated, scale, interpret):
    """The kernel: out float[b s n h], and lse float32[b s n] of the selected branch.

    `gated` is empty, or (gates, compressed, window): then out is the sum of all branches.
    """
    b, s, n, h = q.shape
    t, heads = k.shape[1:3]
    padded = pl.next_power_of_2(n // heads)
    sizes = tiles.pick("selected_attention", compat.device_kind(), q.dtype, h)
    queries = max(min(sizes.rows // padded, union.MOST_QUERIES), 1)
    limit = jnp.minimum(pos, t - 1)
    lists = union.build(blocks, limit, queries=queries, keys=t)
    run = compat.triton_call(
        functools.partial(
            _attend_tile, queries=queries, padded=padded, block=blocks.block, scale=scale
        ),
        grid=(-(-s // queries), heads, b),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        interpret=interpret,
        name="combined_attention_fwd" if gated else "selected_attention_fwd",
    )
    return run(lists.ids, lists.members, lists.whole, lists.count, limit, q, k, v, *gated)


def _attend_tile(*refs, queries, padded, block, scale):
    """One tile of one KV head: rows are `queries` x `padded` heads, of which a group is real."""
    ids, members, whole, count, limit, q, k, v, *gated, out, lse = refs
    tile, head, row = (pl.program_id(axis) for axis in range(3))
    at = row, head, tile
    group = q.shape[2] // k.shape[2]
    rank, member = jnp.arange(queries * padded) // padded, jnp.arange(queries * padded) % padded
    where = row, tile * queries + rank, head * group + member
    real = (member < group) & (where[1] < q.shape[1])
    limits = plgpu.load(limit.at[where[:2]], mask=real, other=-1)
    live = limits >= 0
    rows = _load(q, where, live)

    def step(j, state, *, cut):
        begin = ids[(*at, j)] * block
        here = (row, pl.ds(begin, block), head, slice(None))
        see = (((members[(*at, j)] >> rank) & 1) == 1)[:, None]
        if cut:
            key = begin + jnp.arange(block)
            see &= key[None] <= limits[:, None]
            seen = see.astype(jnp.int32).max(0)[:, None] > 0  # a key that no row sees may hold NaN
            keys, values = (plgpu.load(x.at[here], mask=seen, other=0) for x in (k, v))
        else:
            keys, values = (plgpu.load(x.at[here]) for x in (k, v))
        logits = tile_math.product(rows, keys, 1, 1) * (scale * tile_math.LOG2E)
        return tile_math.add_keys(state, jnp.where(see, logits, -jnp.inf), values)

    m = queries * padded
    state = jnp.full(m, -jnp.inf), jnp.zeros(m), jnp.zeros(rows.shape)
    state = jax.lax.fori_loop(0, whole[at], functools.partial(step, cut=False), state)
    state = jax.lax.fori_loop(whole[at], count[at], functools.partial(step, cut=True), state)
    top, total, acc = state
    safe = jnp.where(total == 0, 1.0, total)
    acc = acc / safe[:, None]
    if gated:
        acc = _combine(acc, *gated, where, live)
    plgpu.store(_wide(out, where), acc.astype(out.dtype), mask=real[:, None])
    value = jnp.where(total == 0, -jnp.inf, (top + jnp.log2(safe)) / tile_math.LOG2E)
    plgpu.store(lse.at[where], value, mask=real)


def _combine(selected, gates, compressed, window, where, live):
    """Sum of gate x branch for rows f32[m h]; 0 where not live."""
    gate = [plgpu.load(gates.at[(*where, i)], mask=live, other=0) for i in range(3)]
    others = (_load(x, where, live).astype(jnp.float32) for x in (compressed, window))
    terms = zip(gate, (next(others), selected, next(others)), strict=True)
    return sum(x.astype(jnp.float32)[:, None] * branch for x, branch in terms)


def _load(ref, where, mask):
    """Rows [m h] of a [b s n h] array; 0 where bool[m] `mask` is False."""
    return plgpu.load(_wide(ref, where), mask=mask[:, None], other=0)


def _wide(ref, where):
    """A view of rows [m h] of a [b s n h] array, by three indices of which two are i32[m]."""
    row, query, head = where
    return ref.at[row, query[:, None], head[:, None], jnp.arange(ref.shape[3])[None]]
