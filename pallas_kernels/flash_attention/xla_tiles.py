"""How attention in plain JAX is cut into tiles, and which key blocks a tile visits.

A tile is some consecutive queries of one batch row and KV head; its rows are the g heads that share
the KV head, times these queries, the queries of a head adjacent.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse.block_set import WORD, unpack


class TileLayout:
    """Cuts [b s ...] arrays into tiles and [b t ...] arrays into blocks, and joins them.

    What is cut has b*k, a batch row and KV head, as its first axis.
    """

    def __init__(self, q_shape, k_shape, sizes):
        self.b, self.s, self.n, _ = q_shape
        self.t, self.k = k_shape[1:3]
        self.block = min(sizes.block_kv, self.t)
        self.blocks = -(-self.t // self.block)
        self.blocks_per_step = min(sizes.blocks_per_step, self.blocks)
        self.queries = min(sizes.queries(self.n // self.k), self.s)

    def rows(self, x):
        """[b s n ...] -> [b*k tiles g*queries ...]."""
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
        """[b t k h] -> [b*k c w h]."""
        x = jnp.moveaxis(_pad(x, self.block, 0), 2, 1)
        return x.reshape(self.b * self.k, self.blocks, self.block, -1)

    def join_keys(self, x):
        """Inverse of `keys`."""
        x = x.reshape(self.b, self.k, self.blocks * self.block, -1)
        return jnp.moveaxis(x, 1, 2)[:, : self.t]

    def masks(self, mask):
        """-> (lo, hi [b*k tiles queries], bits [.. w] or None), the key positions [b*k c w]."""
        lo, hi = self.each_query(mask.lo), self.each_query(mask.hi)
        bits = mask.bits
        if bits is not None:
            bits = jnp.moveaxis(self._tiled(bits), 3, 1)
            bits = bits.reshape(-1, *bits.shape[2:])
        key_pos = mask.key_pos
        if key_pos is None:
            key_pos = jnp.broadcast_to(jnp.arange(self.t, dtype=jnp.int32), (self.b, self.t))
        key_pos = _pad(key_pos, self.block, -1).reshape(self.b, self.blocks, -1)
        return (lo, hi, bits), jnp.repeat(key_pos, self.k, axis=0)

    def each_query(self, x):
        """[b s] -> [b*k tiles queries]."""
        return jnp.repeat(self._tiled(x), self.k, axis=0)

    def join_each_query(self, x):
        """[b*k tiles queries w] -> [b s k w]."""
        return jnp.moveaxis(x.reshape(self.b, self.k, -1, x.shape[-1]), 1, 2)[:, : self.s]

    def _tiled(self, x):
        """[b s ...] -> [b tiles queries ...]."""
        x = _pad(x, self.queries, 0)
        return x.reshape(self.b, -1, self.queries, *x.shape[2:])


@dataclasses.dataclass(frozen=True)
class KVLoop:
    """The key blocks that one tile visits, ascending, some per step.

    Attributes:
      lo: i32[queries] as in `KeyRangeMask`.
      hi: i32[queries] as in `KeyRangeMask`.
      bits: uint32[queries w] as in `KeyRangeMask`, or None.
      key_pos: i32[c w] positions of all keys.
      ids: i32[c] whose first `count` entries are the blocks to visit; None: one step takes all.
      count: i32[] number of blocks to visit.
      blocks_per_step: blocks per step.
    """

    lo: jax.Array
    hi: jax.Array
    bits: jax.Array | None
    key_pos: jax.Array
    ids: jax.Array | None
    count: jax.Array | None
    blocks_per_step: int

    @classmethod
    def plan(cls, queries, key_pos, blocks_per_step):
        """Lists the blocks that at least one query (lo, hi, bits) of the tile may see."""
        lo, hi, bits = queries
        blocks = key_pos.shape[0]
        if blocks_per_step == blocks:
            return cls(lo, hi, bits, key_pos, None, None, blocks_per_step)
        first = jnp.where(hi > lo, lo, jnp.iinfo(jnp.int32).max).min()
        last = jnp.where(hi > lo, hi, 0).max()
        reach = ((first <= key_pos) & (key_pos < last)).any(1)
        if bits is not None:
            union = jax.lax.reduce(bits, jnp.uint32(0), jax.lax.bitwise_or, (0,))
            reach &= unpack(union, blocks)
        slot = jnp.cumsum(reach) - 1
        ids = jnp.zeros(blocks, jnp.int32).at[jnp.where(reach, slot, blocks)]
        ids = ids.set(jnp.arange(blocks, dtype=jnp.int32), mode="drop")
        return cls(lo, hi, bits, key_pos, ids, slot[-1] + 1, blocks_per_step)

    @property
    def steps(self):
        """Number of steps, known only at run time unless one step takes all."""
        if self.ids is None:
            return 1
        return (self.count + self.blocks_per_step - 1) // self.blocks_per_step

    def step(self, i):
        """Step i -> its blocks i32[m] (None: all), and bool[queries m*w] what is seen."""
        ids, key_pos = None, self.key_pos
        if self.ids is not None:
            # Slots past the end repeat the last block and see nothing: their position is negative.
            slot = i * self.blocks_per_step + jnp.arange(self.blocks_per_step)
            ids = self.ids[jnp.minimum(slot, self.count - 1)]
            key_pos = jnp.where((slot < self.count)[:, None], key_pos[ids], -1)
        see = (self.lo[:, None, None] <= key_pos) & (key_pos < self.hi[:, None, None])
        if self.bits is not None:
            see &= self._members(ids)[..., None]
        return ids, see.reshape(see.shape[0], -1)

    def _members(self, ids):
        """bool[queries m]: who chose which of the blocks."""
        if ids is None:
            return unpack(self.bits, self.key_pos.shape[0])
        return (self.bits[:, ids // WORD] >> (ids % WORD).astype(jnp.uint32)) & 1 == 1


def _pad(x, multiple, fill):
    """Pads axis 1 to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % multiple)
    return jnp.pad(x, widths, constant_values=fill)
