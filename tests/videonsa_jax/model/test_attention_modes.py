"""A mode of attention is one entry, also from outside of the package."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests import small_models
from tests.float64_decoder import compare
from tests.small_models import Vision
from tests.videonsa_jax.model import naive_attention
from videonsa_jax.aot.flops import row_flops
from videonsa_jax.config import parse
from videonsa_jax.config.schema import ModelConfig
from videonsa_jax.errors import UserError
from videonsa_jax.model import attention
from videonsa_jax.model.attention import Streams
from videonsa_jax.model.attention_modes import ATTENTION, AttentionMode, options_of

PROMPT = [3, Vision((2, 6, 10), seconds=1.5), 4]
KV_HEAD = (0, 0, 1, 1)  # of each query head


def own_values(queries, keys, values, *, cfg, **settings):
    """Text attends densely, a vision token to itself alone, times the option `factor`."""
    dense = attention.attend(queries, keys, values, cfg=cfg, **settings)
    group = cfg.text.num_heads // cfg.text.num_kv_heads
    own = jnp.repeat(values.vision, group, axis=2) * options_of(cfg)["factor"]
    return Streams(own, dense.text)


@pytest.fixture
def toy(monkeypatch) -> ModelConfig:
    mode = AttentionMode(
        attend=own_values, vision_pairs=lambda cfg, tokens: tokens, options={"factor": 1.0}
    )
    monkeypatch.setitem(ATTENTION, "toy", mode)
    return small_models.config(attention="toy")


def test_a_mode_from_outside_runs_with_its_options(toy):
    toy = dataclasses.replace(toy, attention_options=(("factor", 0.5),))

    def mix(q, k, v, normed, gates, is_vision, _):
        dense = naive_attention.dense(q, k, v)
        return np.where(is_vision[:, None, None], 0.5 * v[:, KV_HEAD], dense)

    compare(toy, small_models.random_params(toy, seed=1), PROMPT, mix)


def test_its_arithmetic_is_counted(toy):
    row = {"vision_tokens": 1000, "text_tokens": 0, "frame_patches": 16}
    dense = dataclasses.replace(toy, attention="dense")
    pairs = row_flops(toy, **row).attention, row_flops(dense, **row).attention
    assert pairs[1] / pairs[0] == 1001 / 2


def test_options_come_from_a_config(toy):
    values = {"preset": "tiny", "attention": "toy", "attention_options": {"factor": 2.0}}
    assert options_of(parse.build(ModelConfig, values, "model")) == {"factor": 2.0}


def test_an_unknown_option_is_named(toy):
    wrong = dataclasses.replace(toy, attention_options=(("facto", 2.0),))
    with pytest.raises(UserError, match=r"attention_options.facto: .*'toy' are \['factor'\]"):
        small_models.abstract_params(wrong)


def test_an_unknown_mode_is_named():
    with pytest.raises(UserError, match="attention='papier' must be one of dense, paper, released"):
        small_models.abstract_params(small_models.config(attention="papier"))
