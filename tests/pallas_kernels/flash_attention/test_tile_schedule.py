"""The schedule of a kernel visits every tile that a query sees, and masks only where it must."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention.tile_schedule import Visits
from pallas_kernels.flash_attention.xla_tiles import Sight

QUERIES, KEYS = 8, 4


def _visited(visits, row, tile):
    """(tiles that are visited whole, the others), as sets."""
    first, whole_first, whole_last, last = np.asarray(visits.spans)[row, tile]
    places = set(range(first, last))
    whole = set(range(whole_first, whole_last))
    assert whole <= places
    if visits.ids is not None:
        ids = np.asarray(visits.ids)[row, tile]
        assert len({ids[place] for place in places}) == len(places), "a tile is visited twice"
        whole, places = ({int(ids[x]) for x in y} for y in (whole, places))
    return whole, places - whole


def _seen(sight, t):
    """bool[b s t] by the definition of a `Sight`."""
    lo, hi = (np.asarray(x)[..., None] for x in (sight.lo, sight.hi))
    pos = np.arange(t) if sight.key_pos is None else np.asarray(sight.key_pos)[:, None]
    return (np.maximum(lo, 0) <= pos) & (pos < hi)


def _ranges(rng, s, t):
    """Ranges that move forward with gaps; some queries see nothing."""
    lo = np.sort(rng.integers(0, t, (2, s)))
    hi = np.where(rng.random((2, s)) < 0.2, 0, lo + rng.integers(1, 30, (2, s)))
    return jnp.asarray(lo, jnp.int32), jnp.asarray(hi, jnp.int32)


@pytest.mark.parametrize("s", [1, 7, 40, 150])  # few queries, and more than are compared directly
@pytest.mark.parametrize("is_listed", [False, True])
def test_whole_tiles_are_all_that_every_query_sees(s, is_listed):
    rng = np.random.default_rng(s)
    t = 61
    lo, hi = _ranges(rng, s, t)
    key_pos = None
    if is_listed:
        key_pos = np.stack([np.roll(np.arange(t), 20), rng.permutation(t)])
        key_pos[rng.random((2, t)) < 0.1] = -1
        key_pos = jnp.asarray(key_pos, jnp.int32)
    sight = Sight(lo, hi, key_pos)
    visits = Visits.plan(sight, t, queries=QUERIES, keys=KEYS)
    seen = _seen(sight, t)
    for row, tile in np.ndindex(2, -(-s // QUERIES)):
        see = seen[row, tile * QUERIES : (tile + 1) * QUERIES]
        live = np.asarray(hi > lo)[row, tile * QUERIES : (tile + 1) * QUERIES]
        whole, part = _visited(visits, row, tile)
        for number in range(-(-t // KEYS)):
            keys = see[:, number * KEYS : (number + 1) * KEYS]
            if keys.any():
                assert number in whole | part
            complete = keys.shape[1] == KEYS and live.any() and keys[live].all()
            assert (number in whole) == complete


@pytest.mark.parametrize("s", [1, 40, 150])
@pytest.mark.parametrize("order", ["forward", "any", "listed"])
def test_from_the_side_of_the_keys_nothing_is_lost_and_whole_tiles_are_whole(s, order):
    rng = np.random.default_rng(s)
    t = 61
    lo, hi = _ranges(rng, s, t)
    key_pos = None
    if order == "any":
        lo, hi = (x[:, rng.permutation(s)] for x in (lo, hi))
    if order == "listed":
        key_pos = jnp.asarray([np.roll(np.arange(t), 20), rng.permutation(t)], jnp.int32)
    sight = Sight(lo, hi, key_pos)
    visits = Visits.plan_by_key(sight, t, queries=QUERIES, keys=KEYS)
    seen, live = _seen(sight, t), np.asarray(hi > lo)
    for row, tile in np.ndindex(2, -(-t // KEYS)):
        whole, part = _visited(visits, row, tile)
        see = seen[row, :, tile * KEYS : (tile + 1) * KEYS]
        for number in range(-(-s // QUERIES)):
            here = slice(number * QUERIES, (number + 1) * QUERIES)
            if see[here].any():
                assert number in whole | part
            if number in whole:
                assert see.shape[1] == KEYS
                assert see[here][live[row, here]].all()


@pytest.mark.parametrize("s", [40, 150])
@pytest.mark.parametrize("is_listed", [False, True])
def test_keys_that_nobody_sees_lose_their_position(s, is_listed):
    rng = np.random.default_rng(s)
    t = 200
    lo, hi = _ranges(rng, s, 90)
    key_pos = np.stack([rng.permutation(t), rng.integers(-1, t, t)]) if is_listed else None
    sight = Sight(lo, hi, None if key_pos is None else jnp.asarray(key_pos, jnp.int32))
    visits = Visits.plan(sight, t, queries=QUERIES, keys=KEYS)
    pos = np.broadcast_to(np.arange(t), (2, t)) if key_pos is None else key_pos
    want = np.where(_seen(sight, t).any(1), pos, -1)
    np.testing.assert_array_equal(visits.key_pos, want)
    assert (want < 0).any()


def test_causal_attention_masks_the_diagonal_only():
    pos = jnp.arange(64, dtype=jnp.int32)[None]
    visits = Visits.plan(Sight(0 * pos, pos + 1), 64, queries=QUERIES, keys=KEYS)
    for tile in range(8):
        whole, part = _visited(visits, 0, tile)
        assert whole == set(range(2 * tile))
        assert part == {2 * tile, 2 * tile + 1}


def test_from_the_side_of_the_keys_causal_attention_masks_the_diagonal_only():
    # Two packed sequences of 32 keys.
    pos = jnp.arange(64, dtype=jnp.int32)[None]
    visits = Visits.plan_by_key(Sight(pos // 32 * 32, pos + 1), 64, queries=QUERIES, keys=KEYS)
    for tile in range(16):
        whole, part = _visited(visits, 0, tile)
        assert part == {tile // 2}
        assert whole == set(range(tile // 2 + 1, 4 if tile < 8 else 8))


def test_from_the_side_of_the_keys_a_window_visits_no_more_than_it_spans():
    pos = jnp.arange(64, dtype=jnp.int32)[None]
    visits = Visits.plan_by_key(Sight(pos - 16, pos + 1), 64, queries=QUERIES, keys=KEYS)
    for tile in range(16):
        whole, part = _visited(visits, 0, tile)
        seen_by = range(tile * KEYS, min(tile * KEYS + KEYS + 16, 64))
        assert whole | part == {query // QUERIES for query in seen_by}
