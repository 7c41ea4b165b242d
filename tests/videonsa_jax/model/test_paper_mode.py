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
from tests.videonsa_jax.model import naive_attention
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


def _mix(q, k, v, normed, gates, is_vision, _):
    return naive_attention.paper(q, k, v, gates_of(normed, gates, SPARSE), is_vision, SPARSE.nsa)


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
