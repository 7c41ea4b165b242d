"""Running layer by layer decides what the model decides."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import small_models
from videonsa_jax.analysis import trace
from videonsa_jax.errors import UserError
from videonsa_jax.model.attention_modes import ATTENTION


def batch_of(cfg):
    prompts = [[3, small_models.Vision((4, 4, 4)), 5], [2, small_models.Vision((2, 4, 8)), 4]]
    arrays = small_models.inputs(prompts, cfg, padding="right", seed=0)
    samples = small_models.samples(arrays, cfg)
    return small_models.batch([[sample] for sample in samples], cfg, spare=2)


def test_gates_are_those_that_the_model_uses(monkeypatch):
    cfg = small_models.config(attention="paper")
    model = small_models.build(cfg, small_models.random_params(cfg, seed=0))
    batch = batch_of(cfg)
    used, mode = [], ATTENTION["paper"]

    def recording(*args, gates, **settings):
        jax.debug.callback(lambda gates: used.append(np.asarray(gates)), gates, ordered=True)
        return mode.attend(*args, gates=gates, **settings)

    with monkeypatch.context() as patch:
        patch.setitem(ATTENTION, "paper", dataclasses.replace(mode, attend=recording))
        model(batch)
        jax.effects_barrier()
    found = [np.asarray(decisions.gates) for decisions in trace.layers(model, batch)]
    seen = batch.vision_order >= 0
    assert len(found) == len(used) == cfg.text.num_layers
    for gates, expected in zip(found, used, strict=True):
        np.testing.assert_allclose(gates[seen], expected[seen], atol=2e-5)


def test_padding_selects_nothing_and_tokens_their_own_block():
    cfg = small_models.config(attention="paper")
    model = small_models.build(cfg, small_models.random_params(cfg, seed=0))
    batch = batch_of(cfg)
    for decisions in trace.layers(model, batch):
        words = np.asarray(decisions.blocks.bits)[..., 0]  # [b r k], fewer than 32 blocks
        assert not words[batch.vision_order < 0].any()
        own = np.arange(words.shape[1]) // cfg.nsa.block_size
        has_own = words >> own[:, None] & 1
        assert has_own[batch.vision_order >= 0].all()


def test_dense_model_decides_nothing():
    cfg = small_models.config(attention="dense")
    model = small_models.build(cfg, small_models.random_params(cfg, seed=0))
    with pytest.raises(UserError, match=r"model\.attention='dense'"):
        next(trace.layers(model, batch_of(cfg)))
