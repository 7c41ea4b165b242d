"""The blocks that a tile of queries visits: one ascending list per tile and KV head.

Neighbouring queries choose mostly the same blocks. A kernel therefore visits the union of a tile's
choices once; the member word of a block says which of the tile's queries chose it. Every slot of a
list finds its block by itself, as the slot-th set bit of the union: no sort, no scatter, and no
array of queries x blocks.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse.block_set import WORD, BlockSet

MOST_QUERIES = 32  # per tile: one bit each in a member word


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVBlockLists:
    """Lists of u slots, of which the first `count` hold a block, for tiles of some queries.

    Attributes:
      ids: i32[b k tiles u] chosen blocks in ascending order, then 0.
      members: i32[b k tiles u] bit r is set where query r of the tile chose the block; then 0.
        None if not asked for.
      num_full: i32[b k tiles] how many leading blocks need no comparison of positions: all of
        their keys exist and lie at or before the limit of each query that sees any key.
      count: i32[b k tiles] how many blocks to visit.
    """

    ids: jax.Array
    members: jax.Array | None
    num_full: jax.Array
    count: jax.Array


def build(
    blocks: BlockSet, limit: jax.Array, *, block_q: int, keys: int, with_members: bool = True
) -> KVBlockLists:
    """Lists the blocks of each tile of `block_q` consecutive queries.

    Args:
      blocks: the blocks chosen by each query and KV head.
      limit: i32[b s] index of the last key a query may see, below `keys`; -1 for a query that sees
        nothing, whatever it chose.
      block_q: queries per tile, at most 32.
      keys: number of keys; blocks past the last key are dropped.
      with_members: whether the kernel needs member words: they cost as many words as queries.
    """
    count = -(-keys // blocks.block)
    bits = jnp.where((limit >= 0)[..., None, None], blocks.bits, 0) & _first(count, blocks.bits)
    bits = jnp.moveaxis(_tiled(bits, block_q, 0), 3, 1)  # [b k tiles queries words]
    most = count if blocks.most is None else min(block_q * blocks.most, count)
    ids, total = _set_bits(jax.lax.reduce(bits, jnp.uint32(0), jax.lax.bitwise_or, (3,)), most)
    used = jnp.arange(most) < total[..., None]
    ids = jnp.where(used, ids, 0)
    members = jnp.where(used, _members(bits, ids), 0) if with_members else None
    shortest = jnp.where(limit >= 0, limit + 1, keys)
    shortest = _tiled(shortest, block_q, keys).min(2)[:, None, :, None]
    num_full = (used & ((ids + 1) * blocks.block <= shortest)).sum(-1, dtype=jnp.int32)
    return KVBlockLists(ids, members, num_full, total)


def _set_bits(words, most):
    """uint32[.. words] -> i32[.. most] numbers of the set bits, and i32[..] how many there are.

    The numbers ascend; the slots after the last one hold anything.
    """
    ones = jax.lax.population_count(words).astype(jnp.int32)
    ends = jnp.cumsum(ones, axis=-1)
    slot = jnp.arange(most, dtype=jnp.int32)
    steps = jnp.roll(words, -1, axis=-1) - words  # modulo 2**32: their sum is exact

    # By sums over the words before a slot's, not by a gather: TPUs gather one element after the
    # other. Word by word: an array of slots x words would be as large as all scores.
    def add(i, sums):
        before = ends[..., i, None] <= slot
        terms = jnp.int32(1), ones[..., i, None], steps[..., i, None]
        return tuple(x + jnp.where(before, term, 0) for x, term in zip(sums, terms, strict=True))

    shape = (*words.shape[:-1], most)
    zeros = tuple(jnp.zeros(shape, dtype) for dtype in (jnp.int32, jnp.int32, jnp.uint32))
    count = words.shape[-1]
    word, begin, value = jax.lax.fori_loop(0, count, add, zeros, unroll=min(count, WORD))
    value, rank = words[..., :1] + value, slot - begin
    return word * WORD + _position(value, rank), ends[..., -1]


def _first(count, bits):
    """uint32[words]: a set bit for each of the first `count` blocks."""
    room = count - WORD * jnp.arange(bits.shape[-1])
    full = jnp.uint32(0xFFFFFFFF) >> jnp.clip(WORD - room, 0, WORD - 1).astype(jnp.uint32)
    return jnp.where(room > 0, full, 0)


def _tiled(x, block_q, fill):
    """[b s ...] -> [b tiles queries ...], padded with `fill`."""
    b, s = x.shape[:2]
    widths = [(0, 0), (0, -s % block_q), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, widths, constant_values=fill).reshape(b, -1, block_q, *x.shape[2:])


def _position(word, rank):
    """The position of the set bit of a uint32 that has `rank` set bits below it."""
    upto = jnp.uint32(0xFFFFFFFF) >> jnp.arange(WORD - 1, -1, -1, dtype=jnp.uint32)
    below = jax.lax.population_count(word[..., None] & upto).astype(jnp.int32)
    return (below <= rank[..., None]).sum(-1, dtype=jnp.int32)


def _members(bits, ids):
    """i32[b k tiles u]: bit r is set where query r of [.. queries words] has the bit `ids`."""
    words = jnp.take_along_axis(bits, (ids // WORD)[..., None, :], axis=-1)  # [.. queries u]
    chosen = (words >> (ids % WORD)[..., None, :].astype(jnp.uint32)) & 1
    rank = jnp.arange(bits.shape[3], dtype=jnp.uint32)[:, None]
    chosen = (chosen << rank).sum(3, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(chosen, jnp.int32)
