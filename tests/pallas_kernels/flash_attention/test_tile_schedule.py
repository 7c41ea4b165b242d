"""The schedule of a kernel visits every tile that a query sees, and masks only where it must."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention.mask import KeyRangeMask
from pallas_kernels.flash_attention.tile_schedule import TileSchedule

QUERIES, KEYS = 8, 4


def _visited(schedule, row, tile):
    """(tiles that are full, the others), as sets."""
    first, full_begin, full_end, last = np.asarray(schedule.ranges)[row, tile]
    places = set(range(first, last))
    full = set(range(full_begin, full_end))
    assert full <= places
    if schedule.ids is not None:
        ids = np.asarray(schedule.ids)[row, tile]
        assert len({ids[place] for place in places}) == len(places), "a tile is visited twice"
        full, places = ({int(ids[x]) for x in y} for y in (full, places))
    return full, places - full


def _seen(mask, t):
    """bool[b s t] by the definition of a `KeyRangeMask`."""
    lo, hi = (np.asarray(x)[..., None] for x in (mask.lo, mask.hi))
    pos = np.arange(t) if mask.key_pos is None else np.asarray(mask.key_pos)[:, None]
    return (np.maximum(lo, 0) <= pos) & (pos < hi)


def _ranges(rng, s, t):
    """Ranges that move forward with gaps; some queries see nothing."""
    lo = np.sort(rng.integers(0, t, (2, s)))
    hi = np.where(rng.random((2, s)) < 0.2, 0, lo + rng.integers(1, 30, (2, s)))
    return jnp.asarray(lo, jnp.int32), jnp.asarray(hi, jnp.int32)


@pytest.mark.parametrize("s", [1, 7, 40, 150])  # few queries, and more than are compared directly
@pytest.mark.parametrize("is_listed", [False, True])
def test_full_tiles_are_all_that_every_query_sees(s, is_listed):
    rng = np.random.default_rng(s)
    t = 61
    lo, hi = _ranges(rng, s, t)
    key_pos = None
    if is_listed:
        key_pos = np.stack([np.roll(np.arange(t), 20), rng.permutation(t)])
        key_pos[rng.random((2, t)) < 0.1] = -1
        key_pos = jnp.asarray(key_pos, jnp.int32)
    mask = KeyRangeMask(lo, hi, key_pos)
    schedule = TileSchedule.by_query(mask, t, block_q=QUERIES, block_kv=KEYS)
    seen = _seen(mask, t)
    for row, tile in np.ndindex(2, -(-s // QUERIES)):
        see = seen[row, tile * QUERIES : (tile + 1) * QUERIES]
        live = np.asarray(hi > lo)[row, tile * QUERIES : (tile + 1) * QUERIES]
        full, partial = _visited(schedule, row, tile)
        for number in range(-(-t // KEYS)):
            keys = see[:, number * KEYS : (number + 1) * KEYS]
            if keys.any():
                assert number in full | partial
            complete = keys.shape[1] == KEYS and live.any() and keys[live].all()
            assert (number in full) == complete


@pytest.mark.parametrize("s", [1, 40, 150])
@pytest.mark.parametrize("order", ["forward", "any", "listed"])
def test_from_the_side_of_the_keys_nothing_is_lost_and_full_tiles_are_full(s, order):
    rng = np.random.default_rng(s)
    t = 61
    lo, hi = _ranges(rng, s, t)
    key_pos = None
    if order == "any":
        lo, hi = (x[:, rng.permutation(s)] for x in (lo, hi))
    if order == "listed":
        key_pos = jnp.asarray([np.roll(np.arange(t), 20), rng.permutation(t)], jnp.int32)
    mask = KeyRangeMask(lo, hi, key_pos)
    schedule = TileSchedule.by_key(mask, t, block_q=QUERIES, block_kv=KEYS)
    seen, live = _seen(mask, t), np.asarray(hi > lo)
    for row, tile in np.ndindex(2, -(-t // KEYS)):
        full, partial = _visited(schedule, row, tile)
        see = seen[row, :, tile * KEYS : (tile + 1) * KEYS]
        for number in range(-(-s // QUERIES)):
            here = slice(number * QUERIES, (number + 1) * QUERIES)
            if see[here].any():
                assert number in full | partial
            if number in full:
                assert see.shape[1] == KEYS
                assert see[here][live[row, here]].all()


@pytest.mark.parametrize("s", [40, 150])
@pytest.mark.parametrize("is_listed", [False, True])
def test_keys_that_nobody_sees_lose_their_position(s, is_listed):
    rng = np.random.default_rng(s)
    t = 200
    lo, hi = _ranges(rng, s, 90)
    key_pos = np.stack([rng.permutation(t), rng.integers(-1, t, t)]) if is_listed else None
    mask = KeyRangeMask(lo, hi, None if key_pos is None else jnp.asarray(key_pos, jnp.int32))
    schedule = TileSchedule.by_query(mask, t, block_q=QUERIES, block_kv=KEYS)
    pos = np.broadcast_to(np.arange(t), (2, t)) if key_pos is None else key_pos
    want = np.where(_seen(mask, t).any(1), pos, -1)
    np.testing.assert_array_equal(schedule.key_pos, want)
    assert (want < 0).any()


def test_causal_attention_masks_the_diagonal_only():
    pos = jnp.arange(64, dtype=jnp.int32)[None]
    schedule = TileSchedule.by_query(
        KeyRangeMask(0 * pos, pos + 1), 64, block_q=QUERIES, block_kv=KEYS
    )
    for tile in range(8):
        full, partial = _visited(schedule, 0, tile)
        assert full == set(range(2 * tile))
        assert partial == {2 * tile, 2 * tile + 1}


def test_from_the_side_of_the_keys_causal_attention_masks_the_diagonal_only():
    # Two packed sequences of 32 keys.
    pos = jnp.arange(64, dtype=jnp.int32)[None]
    schedule = TileSchedule.by_key(
        KeyRangeMask(pos // 32 * 32, pos + 1), 64, block_q=QUERIES, block_kv=KEYS
    )
    for tile in range(16):
        full, partial = _visited(schedule, 0, tile)
        assert partial == {tile // 2}
        assert full == set(range(tile // 2 + 1, 4 if tile < 8 else 8))


def test_from_the_side_of_the_keys_a_window_visits_no_more_than_it_spans():
    pos = jnp.arange(64, dtype=jnp.int32)[None]
    schedule = TileSchedule.by_key(
        KeyRangeMask(pos - 16, pos + 1), 64, block_q=QUERIES, block_kv=KEYS
    )
    for tile in range(16):
        full, partial = _visited(schedule, 0, tile)
        seen_by = range(tile * KEYS, min(tile * KEYS + KEYS + 16, 64))
        assert full | partial == {query // QUERIES for query in seen_by}
