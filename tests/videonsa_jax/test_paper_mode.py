"""Paper mode: vision queries attend sparsely to vision keys, text queries densely to everything.

The oracle is the decoder written again, in numpy float64, in sequence order, with full masks.
"""

import dataclasses

import jax
import numpy as np
import pytest

from tests import small_models
from tests.small_models import Vision
from videonsa_jax.config import NSAConfig
from videonsa_jax.gates import BRANCHES

CFG = small_models.config(
    heads=4, kv_heads=2, attention="paper", nsa=NSAConfig(4, block_count=64, window_size=6)
)
PROMPT = [3, Vision((2, 6, 10), seconds=1.5), 4, Vision((1, 4, 4), is_video=False), 5]


def _with_only(branch: str, params: dict) -> dict:
    """The same parameters with one gate at exactly 1 and the others at 0."""
    bias = np.full((CFG.text.num_layers, CFG.text.num_heads, len(BRANCHES)), -100.0, np.float32)
    bias[..., BRANCHES.index(branch)] = 100
    out = params["text"]["layers"]["gates"]["out"]
    out = {"kernel": 0 * out["kernel"], "bias": bias.reshape(CFG.text.num_layers, -1)}
    layers = {**params["text"]["layers"]}
    layers["gates"] = {**layers["gates"], "out": out}
    return {**params, "text": {**params["text"], "layers": layers}}


def _oracle(params: dict, x: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Decoder of one sequence: embeddings f64[t d], rotary ids i[t 3], mask bool[t t] -> hidden."""
    text = CFG.text
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
        normed, out = norm(x, layer["attn_norm"]["scale"]), 0
        project = {
            name: np.einsum("td,dnh->tnh", normed, layer["attn"][name]["kernel"])
            + layer["attn"][name]["bias"]
            for name in ("q", "k", "v")
        }
        q, k, v = rotate(project["q"]), rotate(project["k"]), project["v"]
        for head in range(text.num_heads):
            kv_head = {0: 0, 1: 0, 2: 1, 3: 1}[head]
            scores = q[:, head] @ k[:, kv_head].T / np.sqrt(text.head_dim)
            weights = np.where(mask, np.exp(scores - scores.max(-1, keepdims=True)), 0)
            weights /= weights.sum(-1, keepdims=True)
            out += weights @ v[:, kv_head] @ layer["attn"]["o"]["kernel"][head]
        x = x + out
        normed, mlp = norm(x, layer["mlp_norm"]["scale"]), layer["mlp"]
        gate, up = normed @ mlp["gate"]["kernel"], normed @ mlp["up"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ mlp["down"]["kernel"]
    return norm(x, np.asarray(params["text"]["norm"]["scale"], np.float64))


@pytest.mark.parametrize("branch", ["slc", "swa"])
def test_one_branch_equals_masked_dense_attention(branch):
    params = _with_only(branch, small_models.random_params(CFG, seed=1))
    arrays = small_models.inputs([PROMPT], CFG, padding="left", seed=2)
    batch = small_models.batch([small_models.samples(arrays, CFG)], CFG, spare=3)
    model = small_models.build(CFG, params)
    got, vision = jax.jit(lambda model, batch: (model(batch)[0][0], model.vision(batch)[0]))(
        model, batch
    )

    order = np.concatenate([batch.vision_order[0], batch.text_order[0]])
    place = np.argsort(np.where(order < 0, 2**30, order))[: (order >= 0).sum()]
    is_vision = place < batch.vision_order.shape[1]
    embedded = params["text"]["embed"]["embedding"][batch.text_tokens[0]]
    x = np.concatenate([vision, embedded]).astype(np.float64)[place]
    ids = np.concatenate([batch.vision_positions[0], batch.text_positions[0]])[place]
    index = np.arange(len(place))
    causal = index <= index[:, None]
    rank = np.cumsum(is_vision)  # how many vision keys up to here
    near = rank > rank[:, None] - CFG.nsa.window_size
    sparse = causal & is_vision & (near if branch == "swa" else True)
    want = _oracle(params, x, ids, np.where(is_vision[:, None], sparse, causal))[~is_vision]
    got = np.asarray(got)[np.asarray(batch.text_order[0]) >= 0]
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max(), rtol=0)


def test_modes_share_parameters_but_not_results():
    params = small_models.random_params(CFG, seed=1)
    arrays = small_models.inputs([PROMPT], CFG, padding="left", seed=2)
    dense = dataclasses.replace(CFG, attention="dense")
    results = []
    for cfg in (CFG, dense):
        batch = small_models.batch([small_models.samples(arrays, cfg)], cfg)
        model = small_models.build(cfg, params)
        results.append(np.asarray(jax.jit(lambda model, batch: model(batch)[0])(model, batch)))
    assert np.abs(results[0] - results[1]).max() > 0.1
