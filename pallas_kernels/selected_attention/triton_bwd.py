"""The gradients of `selected_attention` on NVIDIA GPUs, without atomics: two runs are equal.

Weights are recomputed from the saved lse. The gradient of the queries visits the unions of the
forward pass. The gradients of keys and values visit the query lists: a program holds one block,
gathers some of the queries that chose it times the heads of their group per step, and writes a
float32 sum per segment of the list; a last kernel adds the segments of a block in their order.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes import triton as block_sizes
from pallas_kernels.block_sparse import query_lists
from pallas_kernels.compat import pl, plgpu
from pallas_kernels.flash_attention import online_softmax
from pallas_kernels.flash_attention.online_softmax import product
from pallas_kernels.selected_attention import triton_tiles

SEGMENT = 2048  # queries per program: as many as choose a block on average, at 32 blocks of 64 keys


def backward(residuals, dout, config, *, segment=SEGMENT):
    """See `AttentionKernels`; nothing of `dout` is read where a query sees nothing.

    Args:
      residuals: q, k, v, `ChosenKeys`, out and lse.
      dout: float[b s n h] gradient of `out`.
      config: what is static.
      segment: queries per program of the gradients of keys and values, at most.
    """
    q, k, v, sees, out, lse = residuals
    delta = online_softmax.row_products(dout, out)
    return gradients((q, dout, lse, delta), k, v, sees, config, segment=segment)


def gradients(rows, k, v, sees, config, *, segment=SEGMENT):
    """The gradients of attention with weights exp(logits - lse), not necessarily of sum 1.

    Args:
      rows: of each query
        q float[b s n h],
        dout float[b s n h], of which nothing is read where the query sees nothing,
        lse float32[b s n], -inf where it sees nothing and infinity for weights of 0,
        delta float32[b s n], what is taken off <dout, v> in the gradient of the softmax.
      k: float[b t k h] keys.
      v: float[b t k h] values.
      sees: `ChosenKeys`.
      config: what is static.
      segment: queries per program of the gradients of keys and values, at most.

    Returns:
      dq, dk, dv in the shapes and dtypes of q, k, v.
    """
    dq = _query_grad(rows, k, v, sees, config)
    return dq, *_key_grads(rows, k, v, sees, config, segment)


def _query_grad(rows, k, v, sees, config):
    """dq, by tiles of queries on their unions."""
    q = rows[0]
    (dq,) = triton_tiles.Launch.of("selected_attention_dq", q, k, sees).kernel(
        functools.partial(_query_tile, scale=config.scale),
        "selected_attention_bwd_dq",
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        interpret=config.interpret,
    )(*rows, k, v)
    return dq


def _query_tile(*refs, dims, scale):
    """dq of one tile of one KV head."""
    *schedule, q, dout, lse, delta, k, v, dq = refs
    tile = triton_tiles.tile_of(schedule, q, k, dims)
    rows, douts = (triton_tiles.load_rows(x, tile.where, tile.live) for x in (q, dout))
    base, shift = (plgpu.load(x.at[tile.where], mask=tile.live, other=0) for x in (lse, delta))
    base = online_softmax.finite(base) * online_softmax.LOG2E

    def step(total, keys, values, see):
        products = (
            product(rows, keys, 1, 1),
            product(douts, values, 1, 1),
        )
        dlogits = _dlogits(*products, see, base[:, None], shift[:, None], scale)[1]
        return total + product(dlogits.astype(keys.dtype), keys, 1, 0)

    total = triton_tiles.kv_loop(schedule, tile, k, v, dims, step, jnp.zeros(rows.shape))
    value = (total * scale).astype(dq.dtype)
    plgpu.store(triton_tiles.rows_of(dq, tile.where), value, mask=tile.real[:, None])


def _dlogits(logits, dweights, see, base, shift, scale):
    """The weights and the gradient of the scaled logits, from the products of a tile.

    Both are 0 where a query does not see a key, whatever the products are there. `base` is the lse
    times LOG2E.
    """
    weights = jnp.exp2(logits * (scale * online_softmax.LOG2E) - base)
    weights = jnp.where(see, weights, 0.0)
    return weights, jnp.where(see, weights * (dweights - shift), 0.0)


def _key_grads(rows, k, v, sees, config, segment):
    """dk and dv, by segments of the query lists."""
    q, block = rows[0], sees.blocks.block
    b, t, heads, h = k.shape
    sizes = block_sizes.pick("selected_attention_dkv", compat.device_kind(), q.dtype, h)
    padded = pl.next_power_of_2(q.shape[2] // heads)
    limit = jnp.minimum(sees.pos, t - 1)
    lists = query_lists.build(
        sees.blocks, limit, keys=t, segment=segment, interpret=config.interpret
    )
    segments = lists.block.shape[2]
    dims = triton_tiles.TileDims(max(sizes.block_q // padded, 1), padded, block)
    partial_sum = jax.ShapeDtypeStruct((b, heads, segments, block, h), jnp.float32)
    partial_sums = compat.triton_call(
        functools.partial(_segment, dims=dims, scale=config.scale),
        grid=(segments, heads, b),
        out_shape=(partial_sum, partial_sum),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        interpret=config.interpret,
        name="selected_attention_bwd_dkv",
    )(lists.block, lists.begin, lists.end, lists.queries, limit, *rows, k, v)
    return compat.triton_call(
        functools.partial(_add_segments, scale=config.scale),
        grid=(lists.first.shape[2] - 1, heads, b),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)),
        num_warps=4,
        num_stages=2,
        interpret=config.interpret,
        name="selected_attention_bwd_sum",
    )(lists.first, *partial_sums)


def _segment(*refs, dims, scale):
    """Sums of one segment: what its queries add to the gradients of a block of one KV head.

    Matrices have keys on rows and queries x heads on columns.
    """
    block, begin, end, queries, limit, q, dout, lse, delta, k, v, dk, dv = refs
    z, head, row = (pl.program_id(axis) for axis in range(3))
    at = row, head, z
    first, last = begin[at], end[at]
    group, m = q.shape[2] // k.shape[2], dims.block_q * dims.padded_group
    rank, member = jnp.arange(m) // dims.padded_group, jnp.arange(m) % dims.padded_group

    @pl.when(first < last)
    def _():
        key = block[at] * dims.block + jnp.arange(dims.block)
        exists = key < k.shape[1]
        keys, values = (triton_tiles.load_rows(x, (row, key, head), exists) for x in (k, v))

        def step(i, totals):
            place = first + i * dims.block_q + rank
            real = (place < last) & (member < group)
            query = plgpu.load(queries.at[row, head, place], mask=real, other=0)
            where = row, query, head * group + member
            rows, douts = (triton_tiles.load_rows(x, where, real) for x in (q, dout))
            base, shift = (plgpu.load(x.at[where], mask=real, other=0) for x in (lse, delta))
            base *= online_softmax.LOG2E  # not -inf: each query of the list sees a key
            limits = plgpu.load(limit.at[row, query], mask=real, other=-1)
            see = key[:, None] <= limits[None]
            products = (
                product(keys, rows, 1, 1),
                product(values, douts, 1, 1),
            )
            weights, dlogits = _dlogits(*products, see, base[None], shift[None], scale)
            dkeys = totals[0] + product(dlogits.astype(rows.dtype), rows, 1, 0)
            dvalues = totals[1] + product(weights.astype(rows.dtype), douts, 1, 0)
            return dkeys, dvalues

        steps = (last - first + dims.block_q - 1) // dims.block_q
        zeros = jnp.zeros(keys.shape)
        dk[at], dv[at] = jax.lax.fori_loop(0, steps, step, (zeros, zeros))


def _add_segments(first, dk_sums, dv_sums, dk, dv, *, scale):
    """The gradients of a block of one KV head: its segments, in order."""
    block, head, row = (pl.program_id(axis) for axis in range(3))
    size = dk_sums.shape[3]

    def step(z, totals):
        return tuple(
            total + x[row, head, z] for total, x in zip(totals, (dk_sums, dv_sums), strict=True)
        )

    zeros = jnp.zeros(dk_sums.shape[3:])
    bounds = first[row, head, block], first[row, head, block + 1]
    dkeys, dvalues = jax.lax.fori_loop(*bounds, step, (zeros, zeros))
    key = block * size + jnp.arange(size)
    for ref, value in ((dk, dkeys * scale), (dv, dvalues)):
        exists = (key < ref.shape[1])[:, None]
        plgpu.store(
            triton_tiles.rows_of(ref, (row, key, head)), value.astype(ref.dtype), mask=exists
        )
