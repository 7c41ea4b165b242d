"""`select_blocks` on NVIDIA GPUs: the scores of one chunk of queries exist at a time.

Per chunk, one kernel writes the scores; a second one reads them back while the cache still holds
them, finds the lowest chosen score bit by bit, and packs the chosen set.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes import triton as block_sizes
from pallas_kernels.block_sparse.block_set import WORD, BlockSet
from pallas_kernels.compat import pl, plgpu
from pallas_kernels.flash_attention import online_softmax

SCORE_BYTES = 32 * 2**20  # per chunk, at most; the L2 cache of an H100 is 50 MiB
LEAST_COLUMNS = 512  # the search is never specialised for fewer blocks
FORCED = 0x7F800000  # infinity: ranks before every score


def select_blocks(q, k, lse, visible, own, rule, config):
    """See `Backend.select`."""
    b, s, _, h = q.shape
    c, heads = k.shape[1:3]
    kind = compat.device_kind()
    sizes = block_sizes.pick("block_scores", kind, q.dtype, h)
    search = block_sizes.pick("top_blocks", kind, q.dtype, h)
    fit = SCORE_BYTES // (4 * heads * _columns(c, sizes) * sizes.block_q)
    per_chunk = min(max(fit, 1), -(-s // sizes.block_q))  # tiles of `sizes.block_q` queries
    chunks = -(-s // (per_chunk * sizes.block_q))

    def chunked(x, fill):
        widths = [(0, 0)] * x.ndim
        widths[1] = (0, chunks * per_chunk * sizes.block_q - s)
        return jnp.pad(x, widths, constant_values=fill).reshape(b * chunks, -1, *x.shape[2:])

    def chunk(args):
        visible, own, place = args
        scores = block_scores(q, k, lse, visible, place, sizes, config)
        return top_blocks(scores, visible, own, rule, search, config)

    index = jnp.arange(b * chunks, dtype=jnp.int32)
    places = jnp.stack([index // chunks, index % chunks * per_chunk], axis=1)
    bits = jax.lax.map(chunk, (chunked(visible, 0), chunked(own, -1), places))
    bits = bits.reshape(b, -1, *bits.shape[2:])[:, :s, :, : -(-c // WORD)]
    return BlockSet(bits, rule.block, most=rule.top_k)


def _columns(count, sizes):
    """Columns for the scores of `count` blocks: a power of two, and whole tiles."""
    return max(pl.next_power_of_2(count), sizes.block_kv)


def block_scores(q, k, lse, visible, place, sizes, config):
    """Scores of a chunk of m queries: the weights of block means, summed over a group's heads.

    Args:
      q: float[b s n h] queries.
      k: float[b c k h] block means.
      lse: float32[b s n] of the compressed branch.
      visible: i32[m 2] as in `api.py`, of the chunk; m is a multiple of `sizes.block_q`.
      place: i32[2] the chunk's batch row, and its first query divided by `sizes.block_q`.
      sizes: `TuningConfig`.
      config: what is static.

    Returns:
      float32[k m columns], columns as `top_blocks` takes them; anything where a block is not
      visible.
    """
    c, heads = k.shape[1:3]
    columns = _columns(c, sizes)
    low, high = jnp.moveaxis(visible.reshape(-1, sizes.block_q, 2), 2, 0)
    any_seen = low < high
    reach = jnp.stack(
        [jnp.where(any_seen, low, c).min(1), jnp.where(any_seen, high, 0).max(1)], axis=1
    )
    run = compat.triton_call(
        functools.partial(_score_tile, sizes=sizes, scale=config.scale),
        grid=(len(reach), -(-c // sizes.block_kv), heads),
        out_shape=jax.ShapeDtypeStruct((heads, visible.shape[0], columns), jnp.float32),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        interpret=config.interpret,
        name="block_scores",
    )
    return run(place, reach, q, k, lse)


def _score_tile(place, reach, q, k, lse, out, *, sizes, scale):
    """One tile of queries x block means of one KV head, unless no query of the tile sees any."""
    tile, number, head = (pl.program_id(axis) for axis in range(3))
    group, rows, keys = q.shape[2] // k.shape[2], sizes.block_q, sizes.block_kv

    @pl.when((number * keys < reach[tile, 1]) & (reach[tile, 0] < (number + 1) * keys))
    def _():
        row = place[0]
        # What lies past the end repeats the last query or block: no query sees it.
        query = jnp.minimum((place[1] + tile) * rows + jnp.arange(rows), q.shape[1] - 1)
        block = jnp.minimum(number * keys + jnp.arange(keys), k.shape[1] - 1)
        width = jnp.arange(q.shape[3])[None]
        means = k[row, block[:, None], head, width]

        def add_head(i, total):
            n = head * group + i
            logits = online_softmax.product(q[row, query[:, None], n, width], means, 1, 1)
            base = online_softmax.finite(lse[row, query, n]) * online_softmax.LOG2E
            return total + jnp.exp2(logits * (scale * online_softmax.LOG2E) - base[:, None])

        scores = jax.lax.fori_loop(0, group, add_head, jnp.zeros((rows, keys)))
        out[head, pl.ds(tile * rows, rows), pl.ds(number * keys, keys)] = scores


def top_blocks(scores, visible, own, rule, sizes, config):
    """The set that `jax.lax.top_k` takes of given scores, and the forced blocks.

    Args:
      scores: float32[k m columns], not negative where visible; columns is a power of two, at
        least 32.
      visible: i32[m 2] as in `api.py`.
      own: i32[m] as in `api.py`.
      rule: a `SelectRule`.
      sizes: `TuningConfig`; a program takes rows of columns up to `rows` x `keys` in all.
      config: what is static.

    Returns:
      uint32[m k columns/32] bits as in `BlockSet`.
    """
    heads, m, columns = scores.shape
    budget = sizes.block_q * sizes.block_kv
    rows = math.gcd(max(budget // columns, 1), m)
    run = compat.triton_call(
        functools.partial(_choose, rows=rows, rule=rule),
        grid=(m // rows, heads),
        out_shape=jax.ShapeDtypeStruct((m, heads, columns // WORD), jnp.int32),
        num_warps=sizes.num_warps * max(columns // budget, 1),
        num_stages=sizes.num_stages,
        interpret=config.interpret,
        name="top_blocks",
    )
    return jax.lax.bitcast_convert_type(run(scores, visible, own), jnp.uint32)


def _choose(scores, visible, own, bits, *, rows, rule):
    """Some queries of one KV head, over the first power of two of blocks that holds their own."""
    tile, head = pl.program_id(0), pl.program_id(1)
    here = pl.ds(tile * rows, rows)
    need, columns = own[here].max() + 1, scores.shape[2]
    low, high, last = (x[:, None] for x in (visible[here, 0], visible[here, 1], own[here]))

    def write(size):
        block = jax.lax.broadcasted_iota(jnp.int32, (rows, size), 1)
        seen = (low <= block) & (block < high)
        score = plgpu.load(scores.at[head, here, pl.ds(0, size)], mask=seen, other=0)
        # As integers, floats that are not negative keep their order.
        rank = jax.lax.bitcast_convert_type(score, jnp.int32)
        forced = (block < low + rule.num_init_blocks) | (block > last - rule.num_local_blocks)
        rank = jnp.where(forced, FORCED, rank)
        rank = jnp.where((low <= block) & (block <= last), rank, -1)
        chosen = _top(rank, rule.top_k).astype(jnp.int32).reshape(rows, size // WORD, WORD)
        bit = jax.lax.broadcasted_iota(jnp.int32, chosen.shape, 2)
        bits[here, head, pl.ds(0, size // WORD)] = (chosen << bit).sum(2)
        if size < columns:
            word = jnp.broadcast_to(jnp.arange(columns // WORD)[None], (rows, columns // WORD))
            rest = bits.at[here, head, pl.ds(0, columns // WORD)]
            plgpu.store(rest, jnp.zeros_like(word), mask=word >= size // WORD)

    least = min(columns, LEAST_COLUMNS)
    for size in (columns >> i for i in range((columns // least).bit_length())):
        above = need > (size // 2 if size > least else -1)
        pl.when(above & (need <= size))(functools.partial(write, size))


def _top(rank, count):
    """Members of the `count` highest ranks i32[rows size]; ties to the first, negative ones never.

    Sets the bits of the least chosen rank from the highest to the lowest, as long as `count` ranks
    reach it, and stops early when exactly `count` do in every row.
    """

    def unsettled(state):
        bit, _, found = state
        return (bit >= 0) & (found.max() > count)

    def try_bit(state):
        bit, least, found = state
        trial = least | (1 << bit)
        reach = (rank >= trial[:, None]).astype(jnp.int32).sum(1)
        enough = reach >= count
        return bit - 1, jnp.where(enough, trial, least), jnp.where(enough, reach, found)

    rows = rank.shape[0]
    found = (rank >= 0).astype(jnp.int32).sum(1)
    state = 30, jnp.zeros(rows, jnp.int32), found
    least = jax.lax.while_loop(unsettled, try_bit, state)[1][:, None]
    above, level = rank > least, (rank == least).astype(jnp.int32)
    room = count - above.astype(jnp.int32).sum(1)
    return above | ((level > 0) & (jnp.cumsum(level, axis=1) <= room[:, None]))
