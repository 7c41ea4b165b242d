"""Rows do not depend on each other; sampling and stopping do as they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small_models
from tests.small_models import Vision
from videonsa_jax.model.generate import choose_tokens, generate

CLIP = Vision((2, 6, 10), seconds=1.5)
PROMPTS = [[3, CLIP, 6], [7], [2, Vision((1, 4, 4), is_video=False), 4, Vision((3, 4, 6)), 3]]


@pytest.fixture(params=["paper", "dense"], scope="module")
def setup(request):
    """A model and three prompts of different lengths."""
    cfg = small_models.config(heads=4, kv_heads=2, attention=request.param)
    model = small_models.build(cfg, small_models.random_params(cfg, seed=6))
    arrays = small_models.inputs(PROMPTS, cfg, padding="right", seed=7)
    return model, small_models.samples(arrays, cfg)


def test_rows_of_a_batch_equal_single_rows(setup):
    model, samples = setup
    batch = small_models.batch([[s] for s in samples], model.cfg)
    together = generate(model, batch, max_new_tokens=6)
    assert together.dtype == jnp.int32
    for row, sample in enumerate(samples):
        alone = small_models.batch([[sample]], model.cfg, like=batch)
        np.testing.assert_array_equal(together[row], generate(model, alone, max_new_tokens=6)[0])


def test_a_row_ends_after_its_stop_token(setup):
    model, samples = setup
    batch = small_models.batch([[s] for s in samples], model.cfg)
    free = np.asarray(generate(model, batch, max_new_tokens=6))
    stop = int(free[0, 2])
    stopped = np.asarray(generate(model, batch, max_new_tokens=6, stop_tokens=(stop,)))
    for before, after in zip(free, stopped, strict=True):
        ends = np.flatnonzero(before == stop)
        kept = ends[0] + 1 if len(ends) else len(before)
        np.testing.assert_array_equal(after[:kept], before[:kept])
        assert (after[kept:] == 0).all()


LOGITS = np.log([[0.05, 0.4, 0.15, 0.3, 0.1]]).repeat(500, axis=0).astype(np.float32)


def _chosen(seed, **settings):
    return np.asarray(choose_tokens(LOGITS, jax.random.key(seed), **settings))


def test_temperature_0_takes_the_likeliest():
    assert (_chosen(0, temperature=0.0, top_p=1.0) == 1).all()


def test_samples_follow_the_probabilities_and_the_key():
    tokens = _chosen(0, temperature=1.0, top_p=1.0)
    np.testing.assert_allclose(np.bincount(tokens, minlength=5) / 500, np.exp(LOGITS[0]), atol=0.07)
    assert (tokens != _chosen(1, temperature=1.0, top_p=1.0)).any()
    np.testing.assert_array_equal(tokens, _chosen(0, temperature=1.0, top_p=1.0))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-6, {1}), (0.39, {1}), (0.6, {1, 3}), (0.8, {1, 2, 3})]
)
def test_top_p_keeps_the_smallest_sufficient_set(top_p, kept):
    assert set(_chosen(0, temperature=1.0, top_p=top_p)) == kept


def test_generation_samples_with_the_key():
    cfg = small_models.config()
    model = small_models.build(cfg, small_models.random_params(cfg, seed=6))
    arrays = small_models.inputs([[7], [4]], cfg, padding="right", seed=7)
    batch = small_models.batch([[s] for s in small_models.samples(arrays, cfg)], cfg)
    settings = {"max_new_tokens": 6, "temperature": 2.0}
    first, again, other = (
        np.asarray(generate(model, batch, key=jax.random.key(seed), **settings))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.7}, "needs `key`"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(None, None, **{"max_new_tokens": 1, **settings})
