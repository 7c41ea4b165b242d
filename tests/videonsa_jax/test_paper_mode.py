"""Paper mode: vision queries attend sparsely to vision keys, text queries densely to everything.

The oracle is the decoder written again, in numpy float64, in sequence order, token by token.
"""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.special import erf, expit, softmax

from tests import small_models
from tests.small_models import Vision
from videonsa_jax.config import ModelConfig, NSAConfig
from videonsa_jax.gates import BRANCHES

SPARSE = small_models.config(attention="paper", nsa=NSAConfig(4, block_count=3, window_size=6))
ALL_BLOCKS = dataclasses.replace(SPARSE, nsa=NSAConfig(4, block_count=64, window_size=6))
PROMPT = [3, Vision((2, 6, 10), seconds=1.5), 4, Vision((1, 4, 4), is_video=False), 5]
KV_HEAD = (0, 0, 1, 1)  # of each query head


def _with_only(branch: str, params: dict) -> dict:
    """The same parameters with one gate at exactly 1 and the others at 0."""
    out = params["text"]["layers"]["gates"]["out"]
    bias = np.full((*out["bias"].shape[:1], len(KV_HEAD), len(BRANCHES)), -100.0, np.float32)
    bias[..., BRANCHES.index(branch)] = 100
    out["kernel"], out["bias"] = 0 * out["kernel"], bias.reshape(out["bias"].shape)
    return params


def _attend(query, keys, values):
    """[h], [t h], [t h] -> [h] and the weights [t]; zeros if there are no keys."""
    weights = softmax(keys @ query / np.sqrt(len(query))) if len(keys) else np.zeros(0)
    return weights @ values, weights


def _sparse(at, q, k, v, gates, nsa):
    """Vision query number `at` among vision tokens: q [r n h], k and v [r k h] -> [n h]."""
    size, own = nsa.block_size, at // nsa.block_size
    complete = (at + 1) // size
    out, importance = {}, np.zeros((k.shape[1], complete))
    for head, kv in enumerate(KV_HEAD):
        past = slice(0, complete * size)
        means = [x[past, kv].reshape(complete, size, x.shape[-1]).mean(axis=1) for x in (k, v)]
        out[head, "cmp"], weights = _attend(q[at, head], *means)
        importance[kv] += weights
        window = slice(max(0, at + 1 - nsa.window_size), at + 1)
        out[head, "swa"], _ = _attend(q[at, head], k[window, kv], v[window, kv])
    for head, kv in enumerate(KV_HEAD):
        ranked = [block for block in np.argsort(-importance[kv]) if block != own]
        chosen = [own, *ranked[: nsa.block_count - 1]]
        index = np.flatnonzero(np.isin(np.arange(at + 1) // size, chosen))
        out[head, "slc"], _ = _attend(q[at, head], k[index, kv], v[index, kv])
    return [
        sum(gates[h, i] * out[h, b] for i, b in enumerate(BRANCHES)) for h in range(len(KV_HEAD))
    ]


def _mix(q, k, v, normed, gates, is_vision, cfg):
    """Attention of all tokens of one sequence, [t n h]."""
    hidden = normed @ gates["hidden"]["kernel"] + gates["hidden"]["bias"]
    hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
    logits = hidden @ gates["out"]["kernel"] + gates["out"]["bias"]
    gate = expit(logits / cfg.nsa.gate_temperature).reshape(len(q), len(KV_HEAD), 3)[is_vision]
    vision = [x[is_vision] for x in (q, k, v)]
    out = np.zeros_like(q)
    out[is_vision] = [_sparse(at, *vision, gate[at], cfg.nsa) for at in range(is_vision.sum())]
    for at in np.flatnonzero(~is_vision):
        for head, kv in enumerate(KV_HEAD):
            out[at, head], _ = _attend(q[at, head], k[: at + 1, kv], v[: at + 1, kv])
    return out


def _oracle(params, x, ids, cfg: ModelConfig, mix):
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


def _compare(cfg: ModelConfig, params: dict, mix) -> None:
    """Hidden states of the text of one prompt, in the model and in the oracle with this `mix`."""
    arrays = small_models.inputs([PROMPT], cfg, padding="left", seed=2)
    batch = small_models.batch([small_models.samples(arrays, cfg)], cfg, spare=3)
    run = jax.jit(lambda model, batch: (model(batch)[0][0], model.vision(batch)[0]))
    got, vision = run(small_models.build(cfg, params), batch)

    order = np.concatenate([batch.vision_order[0], batch.text_order[0]])
    place = np.argsort(np.where(order < 0, 2**30, order))[: (order >= 0).sum()]
    is_vision = place < batch.vision_order.shape[1]
    embedded = params["text"]["embed"]["embedding"][batch.text_tokens[0]]
    x = np.concatenate([vision, embedded]).astype(np.float64)[place]
    ids = np.concatenate([batch.vision_positions[0], batch.text_positions[0]])[place]
    want = _oracle(params, x, ids, cfg, lambda *a: mix(*a, is_vision, cfg))[~is_vision]
    got = np.asarray(got)[np.asarray(batch.text_order[0]) >= 0]
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max(), rtol=0)


def test_hidden_states_equal_the_oracle():
    _compare(SPARSE, small_models.random_params(SPARSE, seed=1), _mix)


@pytest.mark.parametrize("branch", ["slc", "swa"])
def test_one_branch_is_dense_attention_with_a_mask(branch):
    def masked(q, k, v, normed, gates, is_vision, cfg):
        index = np.arange(len(q))
        causal = index <= index[:, None]
        rank = np.cumsum(is_vision)  # vision tokens up to here
        near = rank > rank[:, None] - cfg.nsa.window_size
        sparse = causal & is_vision & (near if branch == "swa" else True)
        mask = np.where(is_vision[:, None], sparse, causal)[:, None]
        scores = np.einsum("snh,tnh->snt", q, k[:, KV_HEAD]) / np.sqrt(q.shape[-1])
        weights = softmax(np.where(mask, scores, -np.inf), axis=-1)
        return np.einsum("snt,tnh->snh", weights, v[:, KV_HEAD])

    params = _with_only(branch, small_models.random_params(ALL_BLOCKS, seed=1))
    _compare(ALL_BLOCKS, params, masked)


def test_modes_share_parameters_but_not_results():
    params = small_models.random_params(SPARSE, seed=1)
    arrays = small_models.inputs([PROMPT], SPARSE, padding="left", seed=2)
    dense = dataclasses.replace(SPARSE, attention="dense")
    results = []
    for cfg in (SPARSE, dense):
        batch = small_models.batch([small_models.samples(arrays, cfg)], cfg)
        model = small_models.build(cfg, params)
        results.append(np.asarray(jax.jit(lambda model, batch: model(batch)[0])(model, batch)))
    assert np.abs(results[0] - results[1]).max() > 0.1
