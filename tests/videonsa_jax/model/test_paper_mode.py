"""Paper mode: vision queries attend sparsely to vision keys, text queries densely to everything.

The oracle is the decoder written again, in numpy float64, in sequence order, token by token.
"""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.special import softmax

from tests import small_models
from tests.float64_decoder import compare, gates_of
from tests.small_models import Vision
from videonsa_jax.config.schema import NSAConfig
from videonsa_jax.model.gates import BRANCHES

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


def _mix(q, k, v, normed, gates, is_vision, _, cfg=SPARSE):
    """Attention of all tokens of one sequence, [t n h]."""
    gate = gates_of(normed, gates, cfg)[is_vision]
    vision = [x[is_vision] for x in (q, k, v)]
    out = np.zeros_like(q)
    out[is_vision] = [_sparse(at, *vision, gate[at], cfg.nsa) for at in range(is_vision.sum())]
    for at in np.flatnonzero(~is_vision):
        for head, kv in enumerate(KV_HEAD):
            out[at, head], _ = _attend(q[at, head], k[: at + 1, kv], v[: at + 1, kv])
    return out


def test_hidden_states_equal_the_oracle():
    compare(SPARSE, small_models.random_params(SPARSE, seed=1), PROMPT, _mix)


@pytest.mark.parametrize("branch", ["slc", "swa"])
def test_one_branch_is_dense_attention_with_a_mask(branch):
    def masked(q, k, v, normed, gates, is_vision, _):
        index = np.arange(len(q))
        causal = index <= index[:, None]
        rank = np.cumsum(is_vision)  # vision tokens up to here
        near = rank > rank[:, None] - ALL_BLOCKS.nsa.window_size
        sparse = causal & is_vision & (near if branch == "swa" else True)
        mask = np.where(is_vision[:, None], sparse, causal)[:, None]
        scores = np.einsum("snh,tnh->snt", q, k[:, KV_HEAD]) / np.sqrt(q.shape[-1])
        weights = softmax(np.where(mask, scores, -np.inf), axis=-1)
        return np.einsum("snt,tnh->snh", weights, v[:, KV_HEAD])

    params = _with_only(branch, small_models.random_params(ALL_BLOCKS, seed=1))
    compare(ALL_BLOCKS, params, PROMPT, masked)


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
