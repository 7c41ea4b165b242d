"""The count of operations against parameters and against pairs counted one by one."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

from videonsa_jax.aot.flops import row_flops
from videonsa_jax.config.schema import PRESETS, ComputeConfig, NSAConfig
from videonsa_jax.model.model import VideoNSA
from videonsa_jax.model.nsa import sparse_pairs

SHAPE = {"vision_tokens": 192, "text_tokens": 40, "frame_patches": 64}


def _kernels(cfg):
    """Elements of every matrix by path."""
    model = nnx.eval_shape(lambda: VideoNSA(cfg, compute=ComputeConfig(), rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    flat = traverse_util.flatten_dict(jax.tree.map(lambda x: x.shape, params), sep="/")
    return {path: math.prod(x) for path, x in flat.items() if path.endswith("kernel")}


@pytest.mark.parametrize("preset", ["tiny", "qwen2_5_vl_7b"])
def test_a_matrix_costs_two_operations_per_element_and_token(preset):
    cfg = PRESETS[preset]
    kernels = _kernels(cfg)
    tokens = SHAPE["vision_tokens"] + SHAPE["text_tokens"]

    def total(part, tokens):
        return 2 * tokens * sum(size for path, size in kernels.items() if path.startswith(part))

    flops = row_flops(cfg, **SHAPE)
    gates = total("text/layers/gates", SHAPE["vision_tokens"])
    layers = total("text/layers", tokens) - total("text/layers/gates", tokens)
    assert flops.linear == layers + gates
    patches = 4 * SHAPE["vision_tokens"]
    tower = total("vision", patches) - total("vision/merger", patches)
    tower += total("vision/merger", SHAPE["vision_tokens"])
    vision, frame = cfg.vision, SHAPE["frame_patches"]
    seen = vision.num_layers * frame  # here a window is a frame
    assert flops.tower == tower + 4 * patches * seen * vision.d_model
    head = cfg.text.d_model * cfg.text.vocab_size
    assert flops.head == 2 * head * SHAPE["text_tokens"]
    assert flops.training == 3 * flops.forward


@pytest.mark.parametrize("tokens", [1, 15, 16, 64, 200, 208])
def test_sparse_pairs_are_those_that_queries_see(tokens):
    nsa = NSAConfig(block_size=16, block_count=3, window_size=20)
    pos = np.arange(tokens)
    own, complete = pos // 16, (pos + 1) // 16
    chosen = np.minimum(own, nsa.block_count - 1) * 16 + pos % 16 + 1
    want = complete.sum() + chosen.sum() + np.minimum(pos + 1, 20).sum()
    # Queries whose last block has just begun see less of it than the average counted.
    assert abs(sparse_pairs(nsa, tokens) - want) <= 16**2 / 2


def test_dense_attention_sees_every_pair():
    cfg = dataclasses.replace(PRESETS["tiny"], attention="dense")
    tokens = SHAPE["vision_tokens"] + SHAPE["text_tokens"]
    per_pair = 4 * cfg.text.num_layers * cfg.text.num_heads * cfg.text.head_dim
    assert row_flops(cfg, **SHAPE).attention == per_pair * tokens * (tokens + 1) / 2
