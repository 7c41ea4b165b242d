"""The gradients of `selected_attention` on NVIDIA GPUs, without atomics: two runs are equal.

Weights are recomputed from the saved lse. The gradient of the queries walks the unions of the
forward pass. The gradients of keys and values walk the inverse lists: a program holds one block,
gathers some of the queries that chose it times the heads of their group per step, and writes a
float32 sum per segment of the list; a last kernel adds the segments of a block in their order.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes import triton as tiles
from pallas_kernels.block_sparse import query_lists as inverse
from pallas_kernels.compat import pl, plgpu
from pallas_kernels.flash_attention import online_softmax as tile_math
from pallas_kernels.selected_attention import triton_tiles as union_tile

SEGMENT = 2048  # queries per program: as many as choose a block on average, at 32 blocks of 64 keys


def backward(residuals, dout, *, scale, interpret, segment=SEGMENT):
    """The gradients of `selected_attention`.

    Args:
      residuals: q, k, v, blocks and pos as in `api.py`, then out float[b s n h] and its
        lse float32[b s n].
      dout: float[b s n h] gradient of `out`; nothing is read where a query sees nothing.
      scale: factor of the logits.
      interpret: run in the interpreter.
      segment: queries per program of the gradients of keys and values, at most.

    Returns:
      dq, dk, dv in the shapes and dtypes of q, k, v.
    """
    q, k, v, blocks, pos, out, lse = residuals
    delta = tile_math.row_products(dout, out)
    settings = {"scale": scale, "interpret": interpret, "segment": segment}
    return gradients((q, dout, lse, delta), k, v, blocks, pos, **settings)


def gradients(rows, k, v, blocks, pos, *, scale, interpret, segment=SEGMENT):
    """The gradients of attention with weights exp(logits - lse), not necessarily of sum 1.

    Args:
      rows: of each query
        q float[b s n h],
        dout float[b s n h], of which nothing is read where the query sees nothing,
        lse float32[b s n], -inf where it sees nothing and infinity for weights of 0,
        delta float32[b s n], what is taken off <dout, v> in the gradient of the softmax.
      k: float[b t k h] keys.
      v: float[b t k h] values.
      blocks: a `BlockSet`.
      pos: i32[b s] index of the last key a query may see; -1 for none.
      scale: factor of the logits.
      interpret: run in the interpreter.
      segment: queries per program of the gradients of keys and values, at most.

    Returns:
      dq, dk, dv in the shapes and dtypes of q, k, v.
    """
    dq = _query_grad(rows, k, v, blocks, pos, scale, interpret)
    dk, dv = _key_grads(rows, k, v, blocks, pos, scale, segment, interpret)
    return dq, dk, dv


def _query_grad(rows, k, v, blocks, pos, scale, interpret):
    """dq, by tiles of queries on their unions."""
    q = rows[0]
    (dq,) = union_tile.Plan.of("selected_attention_dq", q, k, blocks, pos).kernel(
        functools.partial(_query_tile, scale=scale),
        "selected_attention_bwd_dq",
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        interpret=interpret,
    )(*rows, k, v)
    return dq


def _query_tile(*refs, cut, scale):
    """dq of one tile of one KV head."""
    *schedule, q, dout, lse, delta, k, v, dq = refs
    tile = union_tile.tile_of(schedule, q, k, cut)
    rows, douts = (union_tile.load_rows(x, tile.where, tile.live) for x in (q, dout))
    base, shift = (plgpu.load(x.at[tile.where], mask=tile.live, other=0) for x in (lse, delta))
    base = tile_math.finite(base) * tile_math.LOG2E

    def step(total, keys, values, see):
        products = tile_math.product(rows, keys, 1, 1), tile_math.product(douts, values, 1, 1)
        dlogits = _dlogits(*products, see, base[:, None], shift[:, None], scale)[1]
        return total + tile_math.product(dlogits.astype(keys.dtype), keys, 1, 0)

    total = union_tile.walk(schedule, tile, k, v, cut, step, jnp.zeros(rows.shape))
    value = (total * scale).astype(dq.dtype)
    plgpu.store(union_tile.rows_of(dq, tile.where), value, mask=tile.real[:, None])


def _dlogits(logits, dweights, see, base, shift, scale):
    """The weights and the gradient of the scaled logits, from the products of a tile.

    Both are 0 where a query does not see a key, whatever the products are there. `base` is the lse
    times LOG2E.
    """
    weights = jnp.exp2(logits * (scale * tile_math.LOG2E) - base)
    weights = jnp.where(see, weights, 0.0)
    return weights, jnp.where(see, weights * (dweights - shift), 0.0)


def _key_grads(rows, k, v, blocks, pos, scale, segment, interpret):
    """dk and dv, by segments of the inverse lists."""
    q = rows[0]
    b, t, heads, h = k.shape
    sizes = tiles.pick("selected_attention_dkv", compat.device_kind(), q.dtype, h)
    padded = pl.next_power_of_2(q.shape[2] // heads)
    limit = jnp.minimum(pos, t - 1)
    lists = inverse.build(blocks, limit, keys=t, segment=segment, interpret=interpret)
    segments = lists.block.shape[2]
    cut = union_tile.Cut(max(sizes.rows // padded, 1), padded, blocks.block)
    partial_sum = jax.ShapeDtypeStruct((b, heads, segments, blocks.block, h), jnp.float32)
    parts = compat.triton_call(
        functools.partial(_segment, cut=cut, scale=scale),
        grid=(segments, heads, b),
        out_shape=(partial_sum, partial_sum),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        interpret=interpret,
        name="selected_attention_bwd_dkv",
    )(lists.block, lists.begin, lists.end, lists.queries, limit, *rows, k, v)
    return compat.triton_call(
        functools.partial(_add_segments, scale=scale),
        grid=(lists.first.shape[2] - 1, heads, b),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)),
        num_warps=4,
        num_stages=2,
        interpret=interpret,
        name="selected_attention_bwd_sum",
    )(lists.first, *parts)


def _segment(*refs, cut, scale):
    """Sums of one segment: what its queries add to the gradients of a block of one KV head.

    Matrices have keys on rows and queries x heads on columns.
    """
    block, begin, end, queries, limit, q, dout, lse, delta, k, v, dk, dv = refs
    z, head, row = (pl.program_id(axis) for axis in range(3))
    at = row, head, z
    first, last = begin[at], end[at]
    group, m = q.shape[2] // k.shape[2], cut.queries * cut.padded
    rank, member = jnp.arange(m) // cut.padded, jnp.arange(m) % cut.padded

    @pl.when(first < last)
    def _():
        key = block[at] * cut.block + jnp.arange(cut.block)
        exists = key < k.shape[1]
        keys, values = (union_tile.load_rows(x, (row, key, head), exists) for x in (k, v))

        def step(i, totals):
            place = first + i * cut.queries + rank
            real = (place < last) & (member < group)
            query = plgpu.load(queries.at[row, head, place], mask=real, other=0)
            where = row, query, head * group + member
            rows, douts = (union_tile.load_rows(x, where, real) for x in (q, dout))
            base, shift = (plgpu.load(x.at[where], mask=real, other=0) for x in (lse, delta))
            base *= tile_math.LOG2E  # not -inf: each query of the list sees a key
            limits = plgpu.load(limit.at[row, query], mask=real, other=-1)
            see = key[:, None] <= limits[None]
            products = tile_math.product(keys, rows, 1, 1), tile_math.product(values, douts, 1, 1)
            weights, dlogits = _dlogits(*products, see, base[None], shift[None], scale)
            dkeys = totals[0] + tile_math.product(dlogits.astype(rows.dtype), rows, 1, 0)
            dvalues = totals[1] + tile_math.product(weights.astype(rows.dtype), douts, 1, 0)
            return dkeys, dvalues

        steps = (last - first + cut.queries - 1) // cut.queries
        zeros = jnp.zeros(keys.shape)
        dk[at], dv[at] = jax.lax.fori_loop(0, steps, step, (zeros, zeros))


def _add_segments(first, dk_parts, dv_parts, dk, dv, *, scale):
    """The gradients of a block of one KV head: its segments, in order."""
    block, head, row = (pl.program_id(axis) for axis in range(3))
    size = dk_parts.shape[3]

    def step(z, totals):
        return tuple(
            total + x[row, head, z] for total, x in zip(totals, (dk_parts, dv_parts), strict=True)
        )

    zeros = jnp.zeros(dk_parts.shape[3:])
    bounds = first[row, head, block], first[row, head, block + 1]
    dkeys, dvalues = jax.lax.fori_loop(*bounds, step, (zeros, zeros))
    key = block * size + jnp.arange(size)
    for ref, value in ((dk, dkeys * scale), (dv, dvalues)):
        exists = (key < ref.shape[1])[:, None]
        plgpu.store(union_tile.rows_of(ref, (row, key, head)), value.astype(ref.dtype), mask=exists)
