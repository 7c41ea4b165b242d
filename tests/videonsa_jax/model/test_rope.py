"""Rotary angles depend on the right coordinate; scores depend on differences of positions only."""

import jax.numpy as jnp
import numpy as np
import pytest

from videonsa_jax.model import rope


def test_each_section_follows_its_coordinate():
    angles = rope.mrope_angles(jnp.array([[[3, 5, 7]]]), (1, 2, 3), theta=64.0)
    want = [3 * 1, 5 / 2, 5 / 4, 7 / 8, 7 / 16, 7 / 32]  # frequencies fall by 64**(1/6) = 2
    np.testing.assert_allclose(angles[0, 0], want, rtol=1e-6)


def test_rows_and_columns_use_the_same_frequencies():
    angles = rope.grid_angles(jnp.array([[[3, 5]]]), head_dim=8, theta=16.0)
    np.testing.assert_allclose(angles[0, 0], [3, 3 / 4, 5, 5 / 4], rtol=1e-6)


@pytest.mark.parametrize("shift", [1, 1000])
def test_scores_depend_on_differences(shift):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 4, 1, 12)).astype(np.float32)

    def scores(offset):
        ids = offset + jnp.arange(4)[None, :, None] * jnp.array([1, 2, 3])
        angles = rope.mrope_angles(ids, (1, 2, 3), theta=1e4)
        return np.einsum("bsnh,btnh->bst", rope.rotate(q, angles), rope.rotate(k, angles))

    np.testing.assert_allclose(scores(shift), scores(0), atol=2e-3)
    assert np.abs(scores(0) - np.einsum("bsnh,btnh->bst", q, k)).max() > 0.1


def test_pairs_are_a_channel_and_the_one_half_a_head_later():
    x = jnp.array([1.0, 10.0, 2.0, 20.0]).reshape(1, 1, 1, 4)
    turned = rope.rotate(x, jnp.array([[[np.pi / 2, 0.0]]]))
    np.testing.assert_allclose(turned.reshape(-1), [-2, 10, 1, 20], atol=1e-5)
