"""Training with the GPU kernels, interpreted, follows training with the portable ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import compat
from tests import synthetic
from videonsa_jax.batch import Batch
from videonsa_jax.config.schema import ComputeConfig, NSAConfig
from videonsa_jax.data.pack import Bucket, frame_patches, pack
from videonsa_jax.training import state as state_lib
from videonsa_jax.training.optimizer import Optimizer
from videonsa_jax.training.step import train_step

STEPS = 200
GRID = (4, 8, 12)  # 96 merged tokens, three blocks of which a query selects two
BUCKET = Bucket(vision_tokens=96, text_tokens=16)
TINY = synthetic.MODEL
MODEL = dataclasses.replace(  # heads of 64, the smallest that the kernels take
    TINY,
    text=dataclasses.replace(
        TINY.text, num_heads=2, num_kv_heads=1, head_dim=64, mrope_section=(8, 12, 12)
    ),
    vision=dataclasses.replace(TINY.vision, num_heads=1),
    nsa=NSAConfig(block_size=32, block_count=2, window_size=16),
)


def _batches():
    rng = np.random.default_rng(0)
    frames = frame_patches([GRID], MODEL)
    for _ in range(4):
        arrays = pack([[synthetic.sample(rng, GRID)]], BUCKET, MODEL)
        yield Batch(**arrays, frame_patches=frames)


def _losses(implementation):
    compute = ComputeConfig(dtype="float32", remat="save_selection", implementation=implementation)
    cfg = synthetic.run_config(model=MODEL, compute=compute, train={"steps": STEPS})
    graphdef, params = nnx.split(state_lib.build_model(cfg))
    params, optimizer = nnx.to_pure_dict(params), Optimizer(cfg.optim, steps=STEPS)
    opt_state = optimizer.transformation().init(optimizer.split(params)[0])
    state = state_lib.TrainState(*(jnp.int32(0) for _ in range(3)), params, opt_state)
    step = jax.jit(
        functools.partial(train_step, graphdef, optimizer),
        donate_argnums=0,
        compiler_options=synthetic.FAST_COMPILE,
    )
    batches, losses = list(_batches()), []
    for i in range(STEPS):
        state, metrics = step(state, batches[i % len(batches)])
        losses.append(metrics["loss"])
    return np.array(losses)


@pytest.mark.slow
def test_the_loss_curves_are_the_same(monkeypatch):
    """A loss falls from about 7 to below 1 in these steps, so errors of gradients would add up."""
    want = _losses("xla")
    kernels, call = set(), compat.triton_call

    def interpreted(kernel, **settings):
        kernels.add(settings["name"])
        return call(kernel, **settings | {"interpret": True})

    monkeypatch.setattr(compat, "platform", lambda: "gpu")
    monkeypatch.setattr(compat, "triton_call", interpreted)
    got = _losses("triton")
    assert {"gate_gradients", "selected_attention_bwd_dkv", "interval_attention_bwd_dq"} <= kernels
    assert want[-1] < 1 < want[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)
