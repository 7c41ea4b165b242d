"""`released` as a mode of the model: its switches, padding, decoding, training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import small_models
from tests.small_models import Vision
from tests.testing import assert_close
from videonsa_jax import generate
from videonsa_jax.config import NSAConfig, ReleasedConfig
from videonsa_jax.loss import next_token_loss

SIZES = NSAConfig(4, block_count=3, window_size=6)
RELEASED = small_models.config(attention="released", nsa=SIZES)
PROMPT = [5, Vision((4, 8, 12), seconds=1.5), 4, Vision((1, 4, 4), is_video=False), 6]
SWITCHES = [field.name for field in dataclasses.fields(ReleasedConfig)]
ALL_OFF = ReleasedConfig(**dict.fromkeys(SWITCHES, False))


def with_switches(**switches):
    return dataclasses.replace(RELEASED, released=dataclasses.replace(ReleasedConfig(), **switches))


def text_logits(cfg, prompts, *, spare=0, rows=None):
    """Logits of the text tokens of each prompt, one per row."""
    model = small_models.build(cfg, small_models.random_params(RELEASED, seed=0))
    samples = small_models.samples(small_models.inputs(prompts, cfg, padding="right", seed=0), cfg)
    batch = small_models.batch([[sample] for sample in samples], cfg, spare=spare)
    hidden, _ = model(batch)
    logits = model.logits(hidden)
    return [row[order >= 0] for row, order in zip(logits, batch.text_order, strict=True)]


def test_with_all_switches_off_it_is_the_paper():
    off = dataclasses.replace(RELEASED, released=ALL_OFF)
    paper = dataclasses.replace(RELEASED, attention="paper")
    assert_close("logits", text_logits(off, [PROMPT])[0], text_logits(paper, [PROMPT])[0])


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_changes_the_output(switch):
    got = text_logits(with_switches(**{switch: False}), [PROMPT])[0]
    assert np.isfinite(got).all()
    assert np.abs(got - text_logits(RELEASED, [PROMPT])[0]).max() > 1e-3


def test_text_alone_is_stock_qwen():
    dense = dataclasses.replace(RELEASED, attention="dense")
    np.testing.assert_array_equal(text_logits(RELEASED, [[9]])[0], text_logits(dense, [[9]])[0])


def test_text_beside_a_video_is_stock_qwen():
    """In a batch with vision a row of text alone goes the mixed way; its sparse terms are zero."""
    dense = dataclasses.replace(RELEASED, attention="dense")
    assert_close(
        "logits", text_logits(RELEASED, [PROMPT, [9]])[1], text_logits(dense, [PROMPT, [9]])[1]
    )


@pytest.mark.parametrize("switches", [{}, {"text_as_zeros": False}, {"absolute_blocks": False}])
def test_padding_and_neighbours_change_nothing(switches):
    cfg = with_switches(**switches)
    other = [3, Vision((2, 4, 8), seconds=2.0), 9]
    alone = [text_logits(cfg, [prompt])[0] for prompt in (PROMPT, other)]
    # Rows are drawn one after the other, so the first of two is what it is alone.
    together = text_logits(cfg, [PROMPT, other], spare=7)
    assert_close("logits", together[0], alone[0])
    assert together[1].shape == alone[1].shape


def test_decoding_is_dense_over_the_cache():
    params = small_models.random_params(RELEASED, seed=0)
    dense = small_models.build(dataclasses.replace(RELEASED, attention="dense"), params)
    model = small_models.build(RELEASED, params)
    arrays = small_models.inputs([PROMPT], RELEASED, padding="right", seed=0)
    batch = small_models.batch([small_models.samples(arrays, RELEASED)], RELEASED)
    _, cache = generate.prefill(model, batch, 1)
    token = jnp.array([7], jnp.int32)
    np.testing.assert_array_equal(
        generate.decode_step(model, token, cache)[0], generate.decode_step(dense, token, cache)[0]
    )


def test_every_parameter_is_trained():
    params = small_models.random_params(RELEASED, seed=0)
    graphdef, _ = small_models.abstract_params(RELEASED)
    arrays = small_models.inputs([PROMPT], RELEASED, padding="right", seed=0)
    batch = small_models.batch([small_models.samples(arrays, RELEASED)], RELEASED)

    def loss(params):
        model = nnx.merge(graphdef, params)
        return next_token_loss(model, model(batch)[0], batch)[0]

    gradients = jax.tree.map_with_path(
        lambda path, x: (jax.tree_util.keystr(path), float(jnp.abs(x).max())),
        jax.grad(loss)(params),
    )
    sizes = dict(jax.tree.leaves(gradients, is_leaf=lambda x: isinstance(x, tuple)))
    assert all(0 < size < np.inf for name, size in sizes.items()), sizes


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="block_count=65 is above 64"):
        dataclasses.replace(RELEASED, nsa=NSAConfig(block_count=65))
    with pytest.raises(ValueError, match="17 query heads per KV head"):
        small_models.config(heads=17, kv_heads=1, attention="released")
