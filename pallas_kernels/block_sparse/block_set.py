"""Sets of chosen blocks, one per query, as packed bits."""

import dataclasses

import jax
import jax.numpy as jnp

WORD = 32  # blocks per word


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockSet:
    """Which blocks each query chose, per KV head: no order, no duplicates, no padding values.

    Attributes:
      bits: uint32[b s k ceil(c/32)]; block j is bit j % 32 of word j // 32.
      block: keys per block.
      most: no query has more blocks than this; None: not known. Kernels size their lists by it.
    """

    bits: jax.Array
    block: int = dataclasses.field(metadata={"static": True})
    most: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of_ids(cls, ids: jax.Array, count: int, block: int) -> "BlockSet":
        """i32[b s k m] numbers of chosen blocks, -1 for none, out of `count` blocks."""
        members = (ids[..., None] == jnp.arange(count)).any(-2)
        return cls(pack(members), block, most=ids.shape[-1])

    def members(self, count: int) -> jax.Array:
        """bool[b s k count]: which of the first `count` blocks are chosen."""
        return unpack(self.bits, count)

    def slice(self, first: jax.Array, count: int) -> "BlockSet":
        """Which of the blocks first .. first + count - 1 are chosen; first becomes block 0."""
        words = -(-count // WORD)
        bits = jnp.pad(self.bits, [(0, 0)] * 3 + [(0, words + 1)])
        here = jax.lax.dynamic_slice_in_dim(bits, first // WORD, words + 1, axis=3)
        shift = jnp.uint32(first % WORD)
        low, high = here[..., :-1] >> shift, here[..., 1:] << 1 << (WORD - 1 - shift)
        return dataclasses.replace(self, bits=(low | high) & pack(jnp.ones(count, bool)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChosenKeys:
    """A query sees the keys of its chosen blocks up to a position.

    Attributes:
      blocks: the blocks chosen by each query and KV head.
      pos: i32[b s] index of the last key that a query may see; -1 for a query that sees nothing.
    """

    blocks: BlockSet
    pos: jax.Array


def pack(members: jax.Array) -> jax.Array:
    """bool[... c] -> uint32[... ceil(c/32)]."""
    c = members.shape[-1]
    words = -(-c // WORD)
    members = jnp.pad(members, [(0, 0)] * (members.ndim - 1) + [(0, words * WORD - c)])
    members = members.reshape(*members.shape[:-1], words, WORD).astype(jnp.uint32)
    return (members << jnp.arange(WORD, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)


def unpack(bits: jax.Array, count: int) -> jax.Array:
    """uint32[... ceil(c/32)] -> bool[... count], count <= 32 ceil(c/32)."""
    members = (bits[..., None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    return members.reshape(*bits.shape[:-1], -1)[..., :count].astype(bool)
