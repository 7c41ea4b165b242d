"""Which key tiles each tile of queries visits, or the reverse: schedules in plain JAX.

A key tile is full for a tile of queries when every query that sees anything sees all of its keys;
nothing has to be masked there. The others are partial. Queries that see nothing take part in no
bound: what a kernel computes for them is dropped. Positions are key indices and visible tiles a
range, or positions are given per key in any order and visible tiles a list.
"""

import dataclasses

import jax
import jax.numpy as jnp

_FAR = jnp.iinfo(jnp.int32).max
_FEW = 64  # queries that are compared with every key directly


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileSchedule:
    """The tiles at places begin .. end - 1; those at full_begin .. full_end - 1 are full.

    They are tiles of keys that a tile of queries visits, or the reverse; see the two functions.

    Attributes:
      key_pos: i32[b t] position of each key, -1 for one that no query sees.
      ranges: i32[b tiles 4] begin, full_begin, full_end, end.
      ids: i32[b tiles c] the tile at each place; None: a place is the number of a tile.
    """

    key_pos: jax.Array
    ranges: jax.Array
    ids: jax.Array | None

    @classmethod
    def by_query(cls, mask, t: int, *, block_q: int, block_kv: int) -> "TileSchedule":
        """The tiles of `block_kv` of t keys that each tile of `block_q` queries visits.

        The `KeyRangeMask` is one without blocks.
        """
        key_pos, bounds = _prepare(mask, t, block_q)
        if mask.key_pos is None:
            return cls(key_pos, _kv_tile_ranges(bounds, block_kv), None)
        return cls(key_pos, *_lists(*_pairs(bounds, key_pos, block_kv)))

    @classmethod
    def by_key(cls, mask, t: int, *, block_q: int, block_kv: int) -> "TileSchedule":
        """The tiles of `block_q` queries that visit each tile of `block_kv` of t keys.

        Where positions are indices a range also holds tiles that see none of the keys if some
        before and after them do.
        """
        key_pos, bounds = _prepare(mask, t, block_q)
        if mask.key_pos is None:
            ranges = _kv_tile_ranges(bounds, block_kv)
            return cls(key_pos, _transpose(ranges, -(-t // block_kv)), None)
        pairs = _pairs(bounds, key_pos, block_kv)
        return cls(key_pos, *_lists(*(jnp.swapaxes(x, 1, 2) for x in pairs)))

    @property
    def arrays(self) -> list[jax.Array]:
        """What a kernel reads: the ranges, and the ids where there are some."""
        return [self.ranges] if self.ids is None else [self.ranges, self.ids]


def _prepare(mask, t, block_q):
    """key_pos as in `TileSchedule`, and the `_Bounds` of tiles of `block_q` queries."""
    if mask.key_pos is None:
        lo, hi = (jnp.clip(x, 0, t) for x in (mask.lo, mask.hi))
        key_pos = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (lo.shape[0], t))
    else:
        lo, hi, key_pos = jnp.maximum(mask.lo, 0), mask.hi, mask.key_pos
    if lo.shape[1] <= _FEW:
        seen = _seen_directly(lo, hi, key_pos)
    elif mask.key_pos is None:
        seen = _seen_by_index(lo, hi, t)
    else:
        seen = _seen_by_position(lo, hi, key_pos)
    return jnp.where(seen, key_pos, -1), _Bounds.of(lo, hi, block_q)


@dataclasses.dataclass(frozen=True)
class _Bounds:
    """The least and the greatest lo and hi of the queries of a tile that see anything; i32[b c]."""

    min_lo: jax.Array
    max_lo: jax.Array
    min_hi: jax.Array
    max_hi: jax.Array
    live: jax.Array  # bool: whether there is one

    @classmethod
    def of(cls, lo, hi, block_q):
        fill = ((0, 0), (0, -lo.shape[1] % block_q))
        lo, hi = (jnp.pad(x, fill).reshape(x.shape[0], -1, block_q) for x in (lo, hi))
        live = hi > lo
        least = [jnp.where(live, x, _FAR).min(-1) for x in (lo, hi)]
        greatest = [jnp.where(live, x, 0).max(-1) for x in (lo, hi)]
        return cls(least[0], greatest[0], least[1], greatest[1], live.any(-1))


def _kv_tile_ranges(bounds, block_kv):
    """The ranges where positions are indices."""
    begin = bounds.min_lo // block_kv
    end = -(-bounds.max_hi // block_kv)
    full_begin = jnp.clip(-(-bounds.max_lo // block_kv), begin, end)
    full_end = jnp.clip(bounds.min_hi // block_kv, full_begin, end)
    ranges = jnp.stack([begin, full_begin, full_end, end], axis=-1)
    return jnp.where(bounds.live[..., None], ranges, 0)


def _transpose(ranges, count):
    """Ranges [b tiles 4] of `count` tiles of keys -> those of tiles of queries [b count 4]."""
    first, full_first, full_last, last = jnp.moveaxis(ranges, 2, 0)
    b, tiles = first.shape
    row, live = jnp.arange(b)[:, None], last > first  # the others bound nothing
    number = jnp.broadcast_to(jnp.arange(tiles, dtype=jnp.int32), first.shape)

    def least_after(at):
        """i32[b count]: the first tile with at > c, for each c."""
        ends = (
            jnp.full((b, count + 1), tiles, jnp.int32)
            .at[row, at]
            .min(jnp.where(live, number, tiles))
        )
        return jax.lax.cummin(ends, axis=1, reverse=True)[:, 1:]

    def behind_upto(at):
        """i32[b count]: one past the last tile with at <= c."""
        ends = jnp.zeros((b, count + 1), jnp.int32).at[row, at].max(jnp.where(live, number + 1, 0))
        return jax.lax.cummax(ends, axis=1)[:, :-1]

    end = behind_upto(first)
    begin = jnp.minimum(least_after(last), end)
    full_begin = jnp.clip(behind_upto(full_last), begin, end)
    full_end = jnp.clip(least_after(full_first), full_begin, end)
    return jnp.stack([begin, full_begin, full_end, end], axis=-1)


def _pairs(bounds, key_pos, block_kv):
    """bool[b tiles c] where positions are given: the key tiles that are visited, and the full."""
    b, t = key_pos.shape
    tiled = jnp.pad(key_pos, ((0, 0), (0, -t % block_kv)), constant_values=-1)
    tiled = tiled.reshape(b, 1, -1, block_kv)
    least, greatest = tiled.min(-1), tiled.max(-1)  # [b 1 c]
    least_seen = jnp.where(tiled < 0, _FAR, tiled).min(-1)
    min_lo, max_lo, min_hi, max_hi = (
        x[..., None] for x in (bounds.min_lo, bounds.max_lo, bounds.min_hi, bounds.max_hi)
    )
    reach = (least_seen < max_hi) & (min_lo <= greatest)
    return reach, reach & (max_lo <= least) & (greatest < min_hi)


def _lists(reach, full):
    """The ranges and ids of visits bool[b tiles c]: first the full tiles, then the partial ones.

    A list has a slot per tile of the other side: s t / (block_q block_kv) numbers in all.
    """
    partial = reach & ~full
    fulls = full.sum(-1, dtype=jnp.int32)
    c = reach.shape[-1]
    slot = jnp.where(full, jnp.cumsum(full, -1) - 1, c)
    slot = jnp.where(partial, fulls[..., None] + jnp.cumsum(partial, -1) - 1, slot)
    numbers = jnp.broadcast_to(jnp.arange(c, dtype=jnp.int32), slot.shape).reshape(-1, c)
    row = jnp.arange(numbers.shape[0])[:, None]
    ids = jnp.zeros_like(numbers).at[row, slot.reshape(-1, c)].set(numbers, mode="drop")
    zeros = jnp.zeros_like(fulls)
    ranges = jnp.stack([zeros, zeros, fulls, reach.sum(-1, dtype=jnp.int32)], axis=-1)
    return ranges, ids.reshape(slot.shape)


def _seen_directly(lo, hi, key_pos):
    """bool[b t]: which keys a query sees, by comparing all."""
    see = (lo[..., None] <= key_pos[:, None]) & (key_pos[:, None] < hi[..., None])
    return see.any(1)


def _seen_by_index(lo, hi, t):
    """bool[b t] where positions are indices: more queries have begun to see than have ended."""
    row = jnp.arange(lo.shape[0])[:, None]
    one = (hi > lo).astype(jnp.int32)
    ends = jnp.concatenate([lo, hi], axis=1), jnp.concatenate([one, -one], axis=1)
    edges = jnp.zeros((lo.shape[0], t + 1), jnp.int32).at[row, ends[0]].add(ends[1])
    return jnp.cumsum(edges, axis=1)[:, :t] > 0


def _seen_by_position(lo, hi, key_pos):
    """bool[b t] for any positions: at or before it, more queries have begun than have ended."""
    live = hi > lo
    begins, ends = (jnp.sort(jnp.where(live, x, _FAR), axis=1) for x in (lo, hi))
    upto = jax.vmap(lambda x, pos: jnp.searchsorted(x, pos, side="right", method="scan_unrolled"))
    return upto(begins, key_pos) > upto(ends, key_pos)
