"""The queries that see a block: one ascending list per block and KV head, in segments.

The inverse of a `BlockSet`, built without sort and without atomics: one kernel counts the bits of
each block in each chunk of queries, a cumulative sum over blocks and chunks says where the queries
of a chunk begin in the list of a block, and a second kernel writes them there. Lists lie one after
another, so memory follows the number of choices and not the longest list.

Some blocks, such as the first, are chosen by almost every query. Lists are therefore cut into
segments of limited length, which are the units of work.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sparse.block_set import WORD, BlockSet
from pallas_kernels.compat import pl, plgpu

CHUNK = 512  # queries per program
NUM_WARPS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryLists:
    """Lists of queries for c blocks, in z segments of which the first are used.

    Attributes:
      queries: i32[b k p] the lists; what no segment covers is undefined.
      block: i32[b k z] the block of a segment.
      begin: i32[b k z] the segment's first place in `queries`.
      end: i32[b k z] the place after its last; that of `begin` for a segment that is not used.
      first: i32[b k c+1] block j has the segments first[j] .. first[j+1] - 1.
    """

    queries: jax.Array
    block: jax.Array
    begin: jax.Array
    end: jax.Array
    first: jax.Array


def build(
    blocks: BlockSet, limit: jax.Array, *, keys: int, segment: int, interpret: bool
) -> QueryLists:
    """Lists, for each block, the queries that chose it and see at least its first key.

    Args:
      blocks: the blocks chosen by each query and KV head. Without `blocks.most` the lists have room
        for every pair of a query and a block.
      limit: i32[b s] index of the last key a query may see, below `keys`; -1 for a query that sees
        nothing, whatever it chose.
      keys: number of keys.
      segment: queries per segment, at most.
      interpret: run in the interpreter.
    """
    b, s, heads, _ = blocks.bits.shape
    count = -(-keys // blocks.block)
    most = count if blocks.most is None else min(blocks.most, count)
    words, chunk = -(-count // WORD), min(CHUNK, pl.next_power_of_2(s))
    chunks = -(-s // chunk)
    bits = jax.lax.bitcast_convert_type(blocks.bits, jnp.int32)
    last = limit // blocks.block  # -1 where limit is

    def launch(kernel, shape, name):
        return compat.triton_call(
            kernel,
            grid=(words, chunks, b * heads),
            out_shape=jax.ShapeDtypeStruct(shape, jnp.int32),
            num_warps=NUM_WARPS,
            num_stages=1,
            interpret=interpret,
            name=name,
        )

    count_bits = functools.partial(_count_bits, chunk=chunk)
    counts = launch(count_bits, (b, heads, words * WORD, chunks), "inverse_count")(bits, last)
    counts = counts[:, :, :count]
    ends = jnp.cumsum(counts.reshape(b, heads, -1), axis=-1).reshape(counts.shape)
    fill = functools.partial(_fill_lists, chunk=chunk, blocks=count)
    run = launch(fill, (b, heads, s * most + 1), "inverse_fill")
    queries = run(bits, last, ends - counts)
    starts = ends[..., 0] - counts[..., 0]
    segments = _segments(starts, ends[..., -1], segment, count + s * most // segment)
    return QueryLists(queries, *segments)


def _segments(starts, ends, segment, slots):
    """Cuts lists at places i32[b k c] into segments: block, begin, end, first."""
    first = jnp.cumsum(-(-(ends - starts) // segment), axis=-1, dtype=jnp.int32)
    slot = jnp.arange(slots, dtype=jnp.int32)
    find = functools.partial(jnp.searchsorted, v=slot, side="right")
    block = jax.vmap(jax.vmap(find))(first).astype(jnp.int32)
    block = jnp.minimum(block, starts.shape[-1] - 1)
    first = jnp.pad(first, ((0, 0), (0, 0), (1, 0)))
    start, stop, before = (
        jnp.take_along_axis(x, block, axis=-1) for x in (starts, ends, first[..., :-1])
    )
    begin = start + (slot - before) * segment
    end = jnp.clip(stop, begin, begin + segment)
    return block, begin, end, first


def _count_bits(bits, last, counts, *, chunk):
    """How many queries of a chunk see each block of a word."""
    word, number, row, head = _place(bits)
    chosen = _column(bits, last, chunk)
    bit = jax.lax.broadcasted_iota(jnp.int32, (chunk, WORD), 1)
    total = ((chosen[:, None] >> bit) & 1).sum(0)
    counts[row, head, pl.ds(word * WORD, WORD), number] = total


def _fill_lists(bits, last, begin, lists, *, chunk, blocks):
    """Writes the queries of a chunk, in order, into the lists of the blocks of a word."""
    word, number, row, head = _place(bits)
    chosen = _column(bits, last, chunk)
    query = number * chunk + jnp.arange(chunk)

    def fill(bit, _):
        here = (chosen >> bit) & 1
        slot = begin[row, head, word * WORD + bit, number] + jnp.cumsum(here) - 1
        # The interpreter stores masked values too, and they must hit no list: the last place
        # belongs to none.
        slot = jnp.where(here == 1, slot, lists.shape[2] - 1)
        plgpu.store(lists.at[row, head, slot], query, mask=here == 1)
        return _

    jax.lax.fori_loop(0, jnp.minimum(blocks - word * WORD, WORD), fill, 0)


def _place(bits):
    """This program's word, chunk, row of the batch and KV head."""
    word, chunk, program = (pl.program_id(axis) for axis in range(3))
    heads = bits.shape[2]
    return word, chunk, jax.lax.div(program, heads), jax.lax.rem(program, heads)


def _column(bits, last, chunk):
    """i32[chunk]: this program's word of each query, without the blocks past its last."""
    word, number, row, head = _place(bits)
    query = number * chunk + jnp.arange(chunk)
    exists = query < bits.shape[1]
    chosen = plgpu.load(bits.at[row, query, head, word], mask=exists, other=0)
    seen = plgpu.load(last.at[row, query], mask=exists, other=-1) + 1 - word * WORD
    some = (1 << jnp.clip(seen, 0, WORD - 1)) - 1
    return chosen & jnp.where(seen < WORD, some, -1)
