"""The chunked loss is the weighted sum of -log p(target), and only that."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from tests import small_models
from videonsa_jax.training import loss


@pytest.fixture(scope="module")
def setup():
    """A text model, a batch of two rows of 11 tokens with weights, and its hidden states."""
    cfg = small_models.config()
    model = small_models.build(cfg, small_models.random_params(cfg, seed=8))
    arrays = small_models.inputs([[11], [7]], cfg, padding="right", seed=9)
    batch = small_models.batch([[s] for s in small_models.samples(arrays, cfg)], cfg)
    weights = batch.text_weights * np.linspace(0.5, 2, 11, dtype=np.float32)
    batch = dataclasses.replace(batch, text_weights=weights)
    return model, model(batch)[0], batch


@pytest.mark.parametrize("chunk", [1, 4, 11, 1024])
def test_loss_is_the_weighted_log_likelihood(setup, chunk, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    model, hidden, batch = setup
    total, weight, metrics = loss.next_token_loss(model, hidden, batch)
    logits = np.asarray(model.logits(hidden), np.float64)
    chosen = np.take_along_axis(log_softmax(logits, axis=-1), batch.text_targets[..., None], -1)
    np.testing.assert_allclose(total, -(chosen[..., 0] * batch.text_weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(weight, batch.text_weights.sum(), rtol=1e-6)
    right = logits.argmax(-1) == batch.text_targets
    np.testing.assert_allclose(metrics["correct"], (right * batch.text_weights).sum(), rtol=1e-6)


def test_gradient_does_not_depend_on_the_chunk(setup, monkeypatch):
    model, hidden, batch = setup
    gradients = []
    for chunk in (4, 1024):
        monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
        gradients.append(jax.grad(lambda h: loss.next_token_loss(model, h, batch)[0])(hidden))
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_unweighted_tokens_do_not_count(setup):
    model, hidden, batch = setup
    targets = np.where(batch.text_weights > 0, batch.text_targets, 5)
    changed = dataclasses.replace(batch, text_targets=targets)
    before, after = (loss.next_token_loss(model, hidden, b)[0] for b in (batch, changed))
    np.testing.assert_array_equal(before, after)
