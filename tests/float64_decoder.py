"""The decoder written again in numpy float64, in sequence order, around any attention."""

from collections.abc import Callable

import jax
import numpy as np
from scipy.special import erf, expit

from tests import small_models
from videonsa_jax.config.schema import ModelConfig
from videonsa_jax.data import positions
from videonsa_jax.data.sample import Sample


def gates_of(normed: np.ndarray, params: dict, cfg: ModelConfig) -> np.ndarray:
    """f64[t d] after the layer's input norm -> gates f64[t n 3]."""
    hidden = normed @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
    logits = hidden @ params["out"]["kernel"] + params["out"]["bias"]
    return expit(logits / cfg.nsa.gate_temperature).reshape(len(normed), -1, 3)


def decode(
    params: dict, x: np.ndarray, ids: np.ndarray, cfg: ModelConfig, mix: Callable
) -> np.ndarray:
    """Decoder of one sequence: embeddings f64[t d], rotary ids i[t 3] -> hidden f64[t d]."""
    text = cfg.text
    half = text.head_dim // 2
    axis = [0] * text.mrope_section[0] + [1] * text.mrope_section[1] + [2] * text.mrope_section[2]
    turn = np.exp(1j * ids[:, axis] * text.rope_theta ** (-np.arange(half) / half))[:, None]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + text.norm_eps) * scale

    def rotate(x):
        turned = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    layers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["text"]["layers"])
    for number in range(text.num_layers):
        layer = jax.tree.map(lambda leaf: leaf[number], layers)  # noqa: B023 (used at once)
        normed, attn = norm(x, layer["attn_norm"]["scale"]), layer["attn"]
        q, k, v = (
            np.einsum("td,dnh->tnh", normed, attn[name]["kernel"]) + attn[name]["bias"]
            for name in "qkv"
        )
        mixed = mix(rotate(q), rotate(k), v, normed, layer["gates"])
        x = x + np.einsum("tnh,nhd->td", mixed, attn["o"]["kernel"])
        normed, mlp = norm(x, layer["mlp_norm"]["scale"]), layer["mlp"]
        gate, up = normed @ mlp["gate"]["kernel"], normed @ mlp["up"]["kernel"]
        x = x + (gate * expit(gate) * up) @ mlp["down"]["kernel"]
    return norm(x, np.asarray(params["text"]["norm"]["scale"], np.float64))


def hidden_states(
    params: dict, sample: Sample, vision: np.ndarray, cfg: ModelConfig, mix: Callable
) -> np.ndarray:
    """Of all tokens of a sample, in sequence order.

    Args:
      params: of the model.
      sample: one sequence.
      vision: its vision features f[r d], in sequence order.
      cfg: the model.
      mix: attention of a layer, of q, k, v, the normed input, the gates' parameters, is_vision
        bool[t] and rotary ids i[t 3], all in sequence order -> f64[t n h].

    Returns:
      f64[t d].
    """
    is_vision = positions.is_vision_token(sample.tokens, cfg)
    ids = positions.mrope_positions(sample.tokens, sample.visuals, cfg)
    x = np.asarray(params["text"]["embed"]["embedding"], np.float64)[sample.tokens]
    x[is_vision] = vision
    return decode(params, x, ids, cfg, lambda *args: mix(*args, is_vision, ids))


def compare(cfg: ModelConfig, params: dict, prompt: list, mix: Callable) -> None:
    """Hidden states of the text of one prompt, in the model and here.

    Args:
      cfg: the model.
      params: its parameters.
      prompt: as for `small_models.inputs`.
      mix: as for `hidden_states`.
    """
    arrays = small_models.inputs([prompt], cfg, padding="left", seed=2)
    (sample,) = small_models.samples(arrays, cfg)
    batch = small_models.batch([[sample]], cfg, spare=3)
    run = jax.jit(lambda model, batch: (model(batch)[0][0], model.vision(batch)[0]))
    got, vision = (np.asarray(x) for x in run(small_models.build(cfg, params), batch))
    want = hidden_states(params, sample, vision[batch.vision_order[0] >= 0], cfg, mix)
    want = want[~positions.is_vision_token(sample.tokens, cfg)]
    got = got[batch.text_order[0] >= 0]
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max(), rtol=0)
