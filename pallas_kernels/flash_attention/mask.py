"""Which keys each query sees: the one kind of mask of attention over ranges of keys."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyRangeMask:
    """A query sees the keys with lo <= position < hi, in its member blocks.

    Four queries with lo = [0, 0, 1, 4] and hi = [1, 2, 4, 4], over four keys in order, and over
    keys of the positions key_pos = [2, 0, 3, -1] (the last one is padding):

              key  0 1 2 3              key  0 1 2 3
        query 0    x . . .        query 0    . x . .
        query 1    x x . .        query 1    . x . .
        query 2    . x x x        query 2    x . x .
        query 3    . . . .        query 3    . . . .

    Attributes:
      lo: i32[b s] first visible position, not negative: a key at -1 is never seen.
      hi: i32[b s] one past the last visible position; a query with hi <= lo sees nothing.
      key_pos: i32[b t] position of each key; None: its index.
      bits: uint32[b s k w] member blocks as in `BlockSet`; None: all blocks.
      block: keys per member block; None without `bits`.
    """

    lo: jax.Array
    hi: jax.Array
    key_pos: jax.Array | None = None
    bits: jax.Array | None = None
    block: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of_ranges(cls, ranges: jax.Array) -> "KeyRangeMask":
        """i32[b s 2] half-open ranges of indices."""
        return cls(ranges[..., 0], ranges[..., 1])

    @classmethod
    def of_window(cls, start: jax.Array, pos: jax.Array, window: int) -> "KeyRangeMask":
        """The last `window` keys up to pos i32[b s], of those from start i32[b s] on."""
        return cls(jnp.maximum(start, pos + 1 - window), pos + 1)

    @classmethod
    def of_positions(
        cls, start: jax.Array, query_pos: jax.Array, key_pos: jax.Array
    ) -> "KeyRangeMask":
        """Keys of the positions key_pos i32[b t] from start i32[b s] to query_pos i32[b s]."""
        return cls(jnp.maximum(start, 0), query_pos + 1, key_pos=key_pos)

    def zero_blind(self, x: jax.Array) -> jax.Array:
        """Zeros the queries of x [b s ...] that see nothing: they may hold NaN."""
        sees = self.hi > self.lo
        return jnp.where(sees.reshape(sees.shape + (1,) * (x.ndim - 2)), x, 0)
