"""`released` as a mode of the model: its switches, padding, decoding, training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import small_models
from tests.float64_decoder import compare, gates_of
from tests.small_models import Vision
from tests.testing import assert_close
from tests.videonsa_jax.model.released import naive
from videonsa_jax.config.schema import NSAConfig, ReleasedConfig
from videonsa_jax.model import generate
from videonsa_jax.training.loss import next_token_loss

SIZES = NSAConfig(4, block_count=3, window_size=6)
RELEASED = small_models.config(attention="released", nsa=SIZES)
PROMPT = [5, Vision((4, 8, 12), seconds=1.5), 4, Vision((1, 4, 4), is_video=False), 6]
SWITCHES = [field.name for field in dataclasses.fields(ReleasedConfig)]
ALL_OFF = ReleasedConfig(**dict.fromkeys(SWITCHES, False))


def with_switches(**switches):
    return dataclasses.replace(RELEASED, released=dataclasses.replace(ReleasedConfig(), **switches))


def prompts_of(cfg, *prompts):
    """One sample per prompt."""
    return small_models.samples(small_models.inputs(prompts, cfg, padding="right", seed=0), cfg)


def logits_of(cfg, samples, *, spare=0):
    """Logits of the text tokens of each sample, one per row."""
    graphdef, _ = small_models.abstract_params(cfg)
    batch = small_models.batch([[sample] for sample in samples], cfg, spare=spare)

    @jax.jit
    def run(params, batch):
        model = nnx.merge(graphdef, params)
        return model.logits(model(batch)[0])

    logits = run(small_models.random_params(RELEASED, seed=0), batch)
    return [row[order >= 0] for row, order in zip(logits, batch.text_order, strict=True)]


def test_hidden_states_equal_the_oracle():
    def mix(q, k, v, normed, gates, _, ids):
        vis = (ids != ids[:, :1]).any(1)
        block, count, window = SIZES.block_size, SIZES.block_count, SIZES.window_size
        gates = gates_of(normed, gates, RELEASED)
        return naive.layer(q, k, v, gates, vis, block=block, count=count, window=window)[0]

    compare(RELEASED, small_models.random_params(RELEASED, seed=1), PROMPT, mix)


def test_with_all_switches_off_it_is_the_paper():
    off = dataclasses.replace(RELEASED, released=ALL_OFF)
    paper = dataclasses.replace(RELEASED, attention="paper")
    got, want = (logits_of(cfg, prompts_of(cfg, PROMPT))[0] for cfg in (off, paper))
    assert_close("logits", got, want)


def test_whole_seconds_move_the_frames():
    """1.5 s between grids of 2 temporal ids per second: 3 ids apart, or 2 when it is cut to 1 s."""
    for whole, apart in ((False, 3), (True, 2)):
        cfg = with_switches(whole_seconds=whole)
        batch = small_models.batch([prompts_of(cfg, PROMPT)], cfg)
        frames = batch.vision_positions[0, :96:24, 0]  # 24 tokens each
        np.testing.assert_array_equal(np.diff(frames), apart)


def test_text_alone_is_stock_qwen():
    dense = dataclasses.replace(RELEASED, attention="dense")
    got, want = (logits_of(cfg, prompts_of(cfg, [9]))[0] for cfg in (RELEASED, dense))
    np.testing.assert_array_equal(got, want)


def test_text_beside_a_video_is_stock_qwen():
    """In a batch with vision a row of text alone goes the mixed way; its sparse terms are zero."""
    dense = dataclasses.replace(RELEASED, attention="dense")
    got, want = (logits_of(cfg, prompts_of(cfg, PROMPT, [9]))[1] for cfg in (RELEASED, dense))
    assert_close("logits", got, want)


@pytest.mark.slow
def test_padding_and_neighbours_change_nothing():
    samples = prompts_of(RELEASED, PROMPT, [3, Vision((2, 4, 8), seconds=2.0), 9])
    together = logits_of(RELEASED, samples, spare=7)
    for sample, got in zip(samples, together, strict=True):
        assert_close("logits", got, logits_of(RELEASED, [sample])[0])


def test_decoding_is_dense_over_the_cache():
    params = small_models.random_params(RELEASED, seed=0)
    dense = small_models.build(dataclasses.replace(RELEASED, attention="dense"), params)
    model = small_models.build(RELEASED, params)
    batch = small_models.batch([prompts_of(RELEASED, PROMPT)], RELEASED)
    _, cache = generate.prefill(model, batch, 1)
    token = jnp.array([7], jnp.int32)
    np.testing.assert_array_equal(
        generate.decode_step(model, token, cache)[0], generate.decode_step(dense, token, cache)[0]
    )


@pytest.mark.slow
def test_every_parameter_is_trained():
    params = small_models.random_params(RELEASED, seed=0)
    graphdef, _ = small_models.abstract_params(RELEASED)
    batch = small_models.batch([prompts_of(RELEASED, PROMPT)], RELEASED)

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
