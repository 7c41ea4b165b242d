"""Which key blocks a tile of queries visits, and what each of its queries sees there.

A lane is one (batch row, KV head). A tile is some consecutive queries of a lane; its rows
are the g heads that share the KV head, times these queries, the queries of a head adjacent.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse.block_set import WORD, unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """What each query sees: keys with lo <= position < hi, in its member blocks.

    Attributes:
      lo: i32[b s] first visible position, not negative: a key at -1 is never seen.
      hi: i32[b s] one past the last visible position; a query with hi <= lo sees nothing.
      key_pos: i32[b t] position of each key; None: its index.
      bits: uint32[b s k w] member blocks, `Tiles.block` keys each; None: all blocks.
    """

    lo: jax.Array
    hi: jax.Array
    key_pos: jax.Array | None = None
    bits: jax.Array | None = None

    @classmethod
    def of_blocks(cls, visible: jax.Array) -> "Sight":
        """i32[b s 2] half-open ranges of block means."""
        return cls(visible[..., 0], visible[..., 1])

    @classmethod
    def of_window(cls, start: jax.Array, pos: jax.Array, window: int) -> "Sight":
        """The last `window` keys up to pos i32[b s], of those from start i32[b s] on."""
        return cls(jnp.maximum(start, pos + 1 - window), pos + 1)

    @classmethod
    def of_positions(cls, start: jax.Array, query_pos: jax.Array, key_pos: jax.Array) -> "Sight":
        """Keys of the positions key_pos i32[b t] from start i32[b s] to query_pos i32[b s]."""
        return cls(jnp.maximum(start, 0), query_pos + 1, key_pos=key_pos)

    def live(self, x):
        """Zeros the queries of x [b s ...] that see nothing: they may hold NaN."""
        live = self.hi > self.lo
        return jnp.where(live.reshape(live.shape + (1,) * (x.ndim - 2)), x, 0)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut. The result depends on it by rounding only.

    Attributes:
      rows: rows of a tile at most; its queries are the power of two that fits, times g heads.
      block: consecutive keys that are fetched, or skipped, together.
      fetch: blocks per step; a step multiplies a tile's rows with `fetch * block` keys.
    """

    rows: int
    block: int
    fetch: int = 1


class Cut:
    """Cuts [b s ...] and [b t ...] arrays into lanes of tiles and of blocks, and joins them."""

    def __init__(self, q_shape, k_shape, tiles):
        self.b, self.s, self.n, _ = q_shape
        self.t, self.k = k_shape[1:3]
        self.block = min(tiles.block, self.t)
        self.blocks = -(-self.t // self.block)
        self.fetch = min(tiles.fetch, self.blocks)
        fit = max(tiles.rows * self.k // self.n, 1)
        self.queries = min(1 << (fit.bit_length() - 1), self.s)

    def rows(self, x):
        """[b s n ...] -> [lanes tiles g*queries ...]."""
        x = self._tiled(x)
        x = x.reshape(*x.shape[:3], self.k, -1, *x.shape[4:])  # [b tiles queries k g ...]
        x = jnp.moveaxis(x, (3, 4), (1, 3))
        return x.reshape(self.b * self.k, x.shape[2], -1, *x.shape[5:])

    def join_rows(self, x):
        """Inverse of `rows`."""
        x = x.reshape(self.b, self.k, x.shape[1], -1, self.queries, *x.shape[3:])
        x = jnp.moveaxis(x, (1, 3), (3, 4))
        return x.reshape(self.b, -1, self.n, *x.shape[5:])[:, : self.s]

    def keys(self, x):
        """[b t k h] -> [lanes c w h]."""
        x = jnp.moveaxis(_pad(x, self.block, 0), 2, 1)
        return x.reshape(self.b * self.k, self.blocks, self.block, -1)

    def join_keys(self, x):
        """Inverse of `keys`."""
        x = x.reshape(self.b, self.k, self.blocks * self.block, -1)
        return jnp.moveaxis(x, 1, 2)[:, : self.t]

    def sights(self, sight):
        """-> (lo, hi [lanes tiles queries], bits [.. w] or None), the key positions [lanes c w]."""
        lo, hi = self.each_query(sight.lo), self.each_query(sight.hi)
        bits = sight.bits
        if bits is not None:
            bits = jnp.moveaxis(self._tiled(bits), 3, 1)
            bits = bits.reshape(-1, *bits.shape[2:])
        key_pos = sight.key_pos
        if key_pos is None:
            key_pos = jnp.broadcast_to(jnp.arange(self.t, dtype=jnp.int32), (self.b, self.t))
        key_pos = _pad(key_pos, self.block, -1).reshape(self.b, self.blocks, -1)
        return (lo, hi, bits), jnp.repeat(key_pos, self.k, axis=0)

    def each_query(self, x):
        """[b s] -> [lanes tiles queries]."""
        return jnp.repeat(self._tiled(x), self.k, axis=0)

    def join_each_query(self, x):
        """[lanes tiles queries w] -> [b s k w]."""
        return jnp.moveaxis(x.reshape(self.b, self.k, -1, x.shape[-1]), 1, 2)[:, : self.s]

    def _tiled(self, x):
        """[b s ...] -> [b tiles queries ...]."""
        x = _pad(x, self.queries, 0)
        return x.reshape(self.b, -1, self.queries, *x.shape[2:])


@dataclasses.dataclass(frozen=True)
class Walk:
    """The key blocks of one tile, ascending, in steps of `fetch` blocks.

    Attributes:
      lo: i32[queries] as in `Sight`.
      hi: i32[queries] as in `Sight`.
      bits: uint32[queries w] as in `Sight`, or None.
      key_pos: i32[c w] positions of all keys.
      ids: i32[c] whose first `count` entries are the blocks to visit; None: one step takes all.
      count: i32[] number of blocks to visit.
      fetch: blocks per step.
    """

    lo: jax.Array
    hi: jax.Array
    bits: jax.Array | None
    key_pos: jax.Array
    ids: jax.Array | None
    count: jax.Array | None
    fetch: int

    @classmethod
    def plan(cls, queries, key_pos, fetch):
        """Lists the blocks that at least one query (lo, hi, bits) of the tile may see."""
        lo, hi, bits = queries
        blocks = key_pos.shape[0]
        if fetch == blocks:
            return cls(lo, hi, bits, key_pos, None, None, fetch)
        first = jnp.where(hi > lo, lo, jnp.iinfo(jnp.int32).max).min()
        last = jnp.where(hi > lo, hi, 0).max()
        reach = ((first <= key_pos) & (key_pos < last)).any(1)
        if bits is not None:
            union = jax.lax.reduce(bits, jnp.uint32(0), jax.lax.bitwise_or, (0,))
            reach &= unpack(union, blocks)
        slot = jnp.cumsum(reach) - 1
        ids = jnp.zeros(blocks, jnp.int32).at[jnp.where(reach, slot, blocks)]
        ids = ids.set(jnp.arange(blocks, dtype=jnp.int32), mode="drop")
        return cls(lo, hi, bits, key_pos, ids, slot[-1] + 1, fetch)

    @property
    def steps(self):
        """Number of steps, known only at run time unless one step takes all."""
        return 1 if self.ids is None else (self.count + self.fetch - 1) // self.fetch

    def step(self, i):
        """Step i -> its blocks i32[fetch] (None: all), and bool[queries fetch*w] what is seen."""
        ids, key_pos = None, self.key_pos
        if self.ids is not None:
            # Slots past the end repeat the last block and see nothing: their position is negative.
            slot = i * self.fetch + jnp.arange(self.fetch)
            ids = self.ids[jnp.minimum(slot, self.count - 1)]
            key_pos = jnp.where((slot < self.count)[:, None], key_pos[ids], -1)
        see = (self.lo[:, None, None] <= key_pos) & (key_pos < self.hi[:, None, None])
        if self.bits is not None:
            see &= self._members(ids)[..., None]
        return ids, see.reshape(see.shape[0], -1)

    def _members(self, ids):
        """bool[queries fetch]: who chose which of the blocks."""
        if ids is None:
            return unpack(self.bits, self.key_pos.shape[0])
        return (self.bits[:, ids // WORD] >> (ids % WORD).astype(jnp.uint32)) & 1 == 1


def _pad(x, multiple, fill):
    """Pads axis 1 to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % multiple)
    return jnp.pad(x, widths, constant_values=fill)
