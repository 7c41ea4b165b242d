"""Prefill and cached steps give what one pass over prompt and answer gives, logits for logits.

The pass is the decoder written again in float64. What follows the prompt is text that attends
densely to everything, in `released` mode as well (docs/released_semantics.md).
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests import small_models
from tests.float64_decoder import gates_of, hidden_states
from tests.small_models import Vision
from tests.videonsa_jax.model import naive_attention
from tests.videonsa_jax.model.released import naive
from videonsa_jax.config.schema import NSAConfig
from videonsa_jax.data.sample import Sample
from videonsa_jax.model import generate

STEPS = 3  # the last tokens of each sequence, fed one by one
PHOTO = Vision((1, 4, 6), is_video=False)
CLIP = Vision((2, 4, 6), seconds=9.0)  # its times run past its height and width
SHORT = Vision((3, 4, 4), seconds=0.5)
SEQUENCES = {
    "text": [5 + STEPS],
    "image": [3, PHOTO, 2 + STEPS],
    "video": [4, CLIP, 1 + STEPS],
    "image_and_video": [2, PHOTO, 1, CLIP, STEPS],
    "two_videos": [1, CLIP, SHORT, 2 + STEPS],
    "ends_with_a_video": [2, PHOTO, 1, CLIP, STEPS - 1],  # and before that the end marker
    "ends_with_an_image": [2, CLIP, PHOTO, STEPS - 1],
}
MODES = ("paper", "dense", "released")
ADVANCES = ("all_axes", "spatial")


@functools.cache
def setup(mode: str, advance: str):
    """A model's config and parameters; the parameters do not depend on the arguments."""
    nsa = NSAConfig(4, block_count=3, window_size=6)
    cfg = small_models.config(attention=mode, nsa=nsa)
    cfg = dataclasses.replace(cfg, position_advance=advance)
    return cfg, small_models.random_params(cfg, seed=6)


@functools.cache
def sequences(mode: str, advance: str, padding: str = "right") -> dict[str, Sample]:
    """Prompts with answers, of all names."""
    cfg, _ = setup(mode, advance)
    arrays = small_models.inputs(list(SEQUENCES.values()), cfg, padding=padding, seed=7)
    return dict(zip(SEQUENCES, small_models.samples(arrays, cfg), strict=True))


@functools.cache
def features() -> dict[str, np.ndarray]:
    """Of the vision tower, in sequence order; the same in all modes."""
    cfg, params = setup("dense", "spatial")
    batch = small_models.batch([[s] for s in sequences("dense", "spatial").values()], cfg)
    rows = jax.jit(lambda model, batch: model.vision(batch))(small_models.build(cfg, params), batch)
    rows = [row[order >= 0] for row, order in zip(rows, batch.vision_order, strict=True)]
    return dict(zip(SEQUENCES, map(np.asarray, rows), strict=True))


@functools.cache
def in_one_pass(mode: str, advance: str, name: str) -> np.ndarray:
    """Logits f64[1 + STEPS v] at the prompt's last token and all tokens of the answer."""
    cfg, params = setup(mode, advance)
    sample = sequences(mode, advance)[name]
    prompt = slice(0, len(sample.tokens) - STEPS)

    def mix(q, k, v, normed, gates, is_vision, ids):
        start, gates = [x[prompt] for x in (q, k, v)], gates_of(normed, gates, cfg)[prompt]
        if mode == "dense":
            out = naive_attention.dense(*start)
        elif mode == "paper":
            out = naive_attention.paper(*start, gates, is_vision[prompt], cfg.nsa)
        else:
            vision = (ids[prompt] != ids[prompt, :1]).any(1)
            sizes = {"block": 4, "count": cfg.nsa.block_count, "window": cfg.nsa.window_size}
            out, _ = naive.layer(*start, gates, vision, **sizes)
        return np.concatenate([out, naive_attention.dense(q[prompt.stop :], k, v)])

    hidden = hidden_states(params, sample, features()[name], cfg, mix)[-1 - STEPS :]
    return hidden @ np.asarray(params["text"]["head"]["kernel"], np.float64)


def cached(mode: str, advance: str, padding: str, names: list[str]) -> np.ndarray:
    """The same of several sequences, f32[b 1+STEPS v], by the model with its cache."""
    cfg, params = setup(mode, advance)
    samples = [sequences(mode, advance, padding)[name] for name in names]
    prompts = [
        dataclasses.replace(s, tokens=s.tokens[:-STEPS], loss_weights=s.loss_weights[:-STEPS])
        for s in samples
    ]
    batch = small_models.batch([[s] for s in prompts], cfg)
    model = small_models.build(cfg, params)
    logits, cache = jax.jit(generate.prefill, static_argnums=2)(model, batch, STEPS)
    step, out = jax.jit(generate.decode_step), [logits]
    for tokens in np.stack([s.tokens[-STEPS:] for s in samples], axis=1):
        logits, cache = step(model, tokens, cache)
        out.append(logits)
    return np.stack(out, axis=1)


def check(mode: str, advance: str, padding: str, names: list[str]) -> None:
    """Every logit to 1e-4 of the largest of its row."""
    for name, got in zip(names, cached(mode, advance, padding, names), strict=True):
        want = in_one_pass(mode, advance, name)
        limit = 1e-4 * np.abs(want).max()
        np.testing.assert_allclose(got, want, atol=limit, rtol=0, err_msg=name)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("advance", ADVANCES)
@pytest.mark.parametrize("mode", [*MODES[:2], pytest.param(MODES[2], marks=pytest.mark.slow)])
def test_a_batch_of_all_prompts(mode, advance, padding):
    check(mode, advance, padding, list(SEQUENCES))


@pytest.mark.slow
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("advance", ADVANCES)
@pytest.mark.parametrize("mode", MODES)
def test_each_prompt_alone(mode, advance, name):
    """In slots that just fit it: text alone has no vision stream."""
    check(mode, advance, "right", [name])
