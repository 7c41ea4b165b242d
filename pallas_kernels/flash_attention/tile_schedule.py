"""Which key tiles each tile of queries visits, or the reverse: schedules in plain JAX.

A key tile is whole for a tile of queries when every query that sees anything sees all of its keys;
nothing has to be masked there. Queries that see nothing take part in no bound: what a kernel
computes for them is dropped. Positions are key indices and visible tiles a range, or positions are
given per key in any order and visible tiles a list.
"""

import dataclasses

import jax
import jax.numpy as jnp

_FAR = jnp.iinfo(jnp.int32).max
_FEW = 64  # queries that are compared with every key directly


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """The tiles at places first .. last - 1; those at whole_first .. whole_last - 1 whole.

    They are tiles of keys that a tile of queries visits, or the reverse; see the two functions.

    Attributes:
      key_pos: i32[b t] position of each key, -1 for one that no query sees.
      spans: i32[b tiles 4] first, whole_first, whole_last, last.
      ids: i32[b tiles c] the tile at each place; None: a place is the number of a tile.
    """

    key_pos: jax.Array
    spans: jax.Array
    ids: jax.Array | None

    @classmethod
    def plan(cls, sight, t: int, *, queries: int, keys: int) -> "Visits":
        """The tiles of `keys` of t keys that each tile of `queries` queries visits.

        The `Sight` is one without blocks.
        """
        key_pos, bounds = _prepare(sight, t, queries)
        if sight.key_pos is None:
            return cls(key_pos, _ranges(bounds, keys), None)
        return cls(key_pos, *_lists(*_pairs(bounds, key_pos, keys)))

    @classmethod
    def plan_by_key(cls, sight, t: int, *, queries: int, keys: int) -> "Visits":
        """The tiles of `queries` queries that visit each tile of `keys` of t keys.

        Where positions are indices a span also holds tiles that see none of the keys if some
        before and after them do.
        """
        key_pos, bounds = _prepare(sight, t, queries)
        if sight.key_pos is None:
            return cls(key_pos, _turned(_ranges(bounds, keys), -(-t // keys)), None)
        pairs = _pairs(bounds, key_pos, keys)
        return cls(key_pos, *_lists(*(jnp.swapaxes(x, 1, 2) for x in pairs)))


def _prepare(sight, t, queries):
    """key_pos as in `Visits`, and the `_Bounds` of tiles of `queries` queries."""
    if sight.key_pos is None:
        lo, hi = (jnp.clip(x, 0, t) for x in (sight.lo, sight.hi))
        key_pos = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (lo.shape[0], t))
    else:
        lo, hi, key_pos = jnp.maximum(sight.lo, 0), sight.hi, sight.key_pos
    if lo.shape[1] <= _FEW:
        seen = _seen_directly(lo, hi, key_pos)
    elif sight.key_pos is None:
        seen = _seen_by_index(lo, hi, t)
    else:
        seen = _seen_by_position(lo, hi, key_pos)
    return jnp.where(seen, key_pos, -1), _Bounds.of(lo, hi, queries)


@dataclasses.dataclass(frozen=True)
class _Bounds:
    """The least and the greatest lo and hi of the queries of a tile that see anything; i32[b c]."""

    min_lo: jax.Array
    max_lo: jax.Array
    min_hi: jax.Array
    max_hi: jax.Array
    live: jax.Array  # bool: whether there is one

    @classmethod
    def of(cls, lo, hi, queries):
        fill = ((0, 0), (0, -lo.shape[1] % queries))
        lo, hi = (jnp.pad(x, fill).reshape(x.shape[0], -1, queries) for x in (lo, hi))
        live = hi > lo
        least = [jnp.where(live, x, _FAR).min(-1) for x in (lo, hi)]
        greatest = [jnp.where(live, x, 0).max(-1) for x in (lo, hi)]
        return cls(least[0], greatest[0], least[1], greatest[1], live.any(-1))


def _ranges(bounds, keys):
    """The spans where positions are indices."""
    first = bounds.min_lo // keys
    last = -(-bounds.max_hi // keys)
    whole_first = jnp.clip(-(-bounds.max_lo // keys), first, last)
    whole_last = jnp.clip(bounds.min_hi // keys, whole_first, last)
    spans = jnp.stack([first, whole_first, whole_last, last], axis=-1)
    return jnp.where(bounds.live[..., None], spans, 0)


def _turned(spans, count):
    """Spans [b tiles 4] of `count` tiles of keys -> those of tiles of queries [b count 4]."""
    first, whole_first, whole_last, last = jnp.moveaxis(spans, 2, 0)
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
    whole_begin = jnp.clip(behind_upto(whole_last), begin, end)
    whole_end = jnp.clip(least_after(whole_first), whole_begin, end)
    return jnp.stack([begin, whole_begin, whole_end, end], axis=-1)


def _pairs(bounds, key_pos, keys):
    """bool[b tiles c] where positions are given: which key tiles are visited, and which whole."""
    b, t = key_pos.shape
    tiled = jnp.pad(key_pos, ((0, 0), (0, -t % keys)), constant_values=-1).reshape(b, 1, -1, keys)
    least, greatest = tiled.min(-1), tiled.max(-1)  # [b 1 c]
    least_seen = jnp.where(tiled < 0, _FAR, tiled).min(-1)
    min_lo, max_lo, min_hi, max_hi = (
        x[..., None] for x in (bounds.min_lo, bounds.max_lo, bounds.min_hi, bounds.max_hi)
    )
    reach = (least_seen < max_hi) & (min_lo <= greatest)
    return reach, reach & (max_lo <= least) & (greatest < min_hi)


def _lists(reach, whole):
    """The spans and ids of visits bool[b tiles c]: first the whole tiles, then the others.

    A list has a slot per tile of the other side: s t / (rows keys) numbers in all.
    """
    part = reach & ~whole
    wholes = whole.sum(-1, dtype=jnp.int32)
    c = reach.shape[-1]
    slot = jnp.where(whole, jnp.cumsum(whole, -1) - 1, c)
    slot = jnp.where(part, wholes[..., None] + jnp.cumsum(part, -1) - 1, slot)
    numbers = jnp.broadcast_to(jnp.arange(c, dtype=jnp.int32), slot.shape).reshape(-1, c)
    lane = jnp.arange(numbers.shape[0])[:, None]
    ids = jnp.zeros_like(numbers).at[lane, slot.reshape(-1, c)].set(numbers, mode="drop")
    zeros = jnp.zeros_like(wholes)
    spans = jnp.stack([zeros, zeros, wholes, reach.sum(-1, dtype=jnp.int32)], axis=-1)
    return spans, ids.reshape(slot.shape)


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
