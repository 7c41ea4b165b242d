"""The closed form equals counting pair by pair, and what a model's layers select."""

import numpy as np
import pytest

from pallas_kernels import NSASpec, nsa_blocks
from videonsa_jax.analysis import attended
from videonsa_jax.config.schema import NSAConfig

SIZES = [NSAConfig(4, 2, 6), NSAConfig(4, 1, 1), NSAConfig(8, 3, 5), NSAConfig(1, 2, 3)]


def brute_force(tokens, nsa):
    """(compressed, selected, window, causal) pairs; earlier blocks are chosen at random."""
    rng = np.random.default_rng(0)
    compressed = selected = window = causal = 0
    for t in range(tokens):
        causal += t + 1
        window += sum(t - nsa.window_size < u <= t for u in range(tokens))
        blocks = range(-(-tokens // nsa.block_size))
        compressed += sum((j + 1) * nsa.block_size - 1 <= t for j in blocks)
        own = t // nsa.block_size
        chosen = {own, *rng.permutation(own)[: nsa.block_count - 1].tolist()}
        selected += sum(u // nsa.block_size in chosen for u in range(t + 1))
    return compressed, selected, window, causal


@pytest.mark.parametrize("nsa", SIZES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 17, 40])
def test_closed_form_equals_counting(tokens, nsa):
    counts = attended.pair_counts(tokens, nsa)
    found = (counts.compressed, counts.selected, counts.window, counts.causal)
    assert found == brute_force(tokens, nsa)
    assert attended.attended_fraction(tokens, nsa) == sum(found[:3]) / found[3]


def test_no_vision_tokens_attend_to_nothing():
    assert attended.attended_fraction(0, NSAConfig()) == 0


def test_published_setting_at_128_000_tokens():
    counts = attended.pair_counts(128_000, NSAConfig())
    assert 0.035 < (counts.selected + counts.window) / counts.causal < 0.036  # published: 3.6%


def test_closed_form_equals_the_selection_of_the_attention():
    tokens = 37
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, tokens, n, 8), np.float32) for n in (4, 2))
    blocks = nsa_blocks(q, k, spec=NSASpec(4, 3, 6), implementation="reference")
    members = np.asarray(blocks.members(-(-tokens // 4)))[0]
    expected = attended.pair_counts(tokens, NSAConfig(4, 3, 6)).selected
    assert attended.selected_pairs(members, 4) == expected
