"""The released top-k network against its known outputs."""

import jax.numpy as jnp
import numpy as np
import pytest

from videonsa_jax.model.released.topk import network_top

# Own block: what is chosen, in order, of 32 where all earlier blocks score 1 and the own one 16.
TIES = {
    5: "5 2 4 3 1 0" + " -1" * 26,
    64: "64 49 51 50 54 55 53 52 60 61 63 62 58 59 57 56 "
    "40 41 43 42 46 47 45 44 36 37 39 38 34 35 33 32",
    100: "100 80 83 81 86 87 85 82 92 93 95 94 90 91 89 84 "
    "72 73 75 74 78 79 77 76 68 69 71 96 99 97 98 88",
}
TIED_SETS = {
    200: {*range(160, 176), *range(184, 188), *range(189, 201)},
    300: {264, 265, 267, *range(272, 301)},
    511: {*range(480, 512)},
}


def choose(own, *, past=1.0, here=16.0, count=32):
    """The network's ids with all earlier blocks at one score."""
    scores = jnp.full(own + 9, past).at[own].set(here)
    return np.asarray(network_top(scores, jnp.int32(own), count)).tolist()


@pytest.mark.parametrize("own", TIES)
def test_ties_come_in_the_networks_order(own):
    assert choose(own) == [int(block) for block in TIES[own].split()]


@pytest.mark.parametrize("own", TIED_SETS)
def test_ties_choose_the_networks_set(own):
    assert set(choose(own)) == TIED_SETS[own]


def test_own_block_loses_to_higher_ties():
    assert set(choose(40, past=16.0, here=1.0)) == set(range(8, 40))
    assert choose(5, past=16.0, here=1.0)[:6] == [2, 3, 1, 4, 0, 5]


def test_scores_of_zero_lose_to_empty_entries():
    assert choose(5, past=0.0) == [5] + [-1] * 31


@pytest.mark.parametrize("count", [1, 4, 16, 32])
def test_is_the_true_top_without_ties(count):
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.1, 1, (50, 300)).astype(np.float32)
    own = rng.integers(0, 300, 50)
    ids = np.asarray(network_top(jnp.asarray(scores), jnp.asarray(own, jnp.int32), count))
    for row, last, got in zip(scores, own, ids, strict=True):
        best = np.argsort(-row[: last + 1])[:count]
        assert set(got[got >= 0]) == set(best)


def test_counts_round_up_to_a_power_of_two():
    assert len(choose(100, count=20)) == 32
    with pytest.raises(ValueError, match="65 is above 64"):
        choose(100, count=65)


def test_above_32_only_half_of_the_last_64_survives():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.uniform(0.1, 1, 201), jnp.float32).at[200].set(16.0)
    ids = np.asarray(network_top(scores, jnp.int32(200), 64))
    assert (ids >= 0).sum() == 32 + 200 % 64 + 1
