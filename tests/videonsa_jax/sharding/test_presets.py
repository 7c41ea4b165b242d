"""A sharding strategy changes where numbers are, not what they are."""

import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests import synthetic
from videonsa_jax import state as state_lib
from videonsa_jax.config import MeshConfig
from videonsa_jax.optimizer import Optimizer
from videonsa_jax.sharding import rules, shard
from videonsa_jax.sharding.mesh import make_mesh
from videonsa_jax.step import gradients

MESHES = {
    "dp": MeshConfig(data=8),
    "fsdp": MeshConfig(fsdp=8),
    "hsdp": MeshConfig(dcn=2, fsdp=4),
    "tp": MeshConfig(data=4, tensor=2),
    "fsdp_tp": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp_cp": MeshConfig(fsdp=4, context=2),
    "fsdp_tp_cp": MeshConfig(fsdp=2, tensor=2, context=2),
}


def loss_and_gradients(mesh_cfg: MeshConfig, preset: str, devices=None):
    cfg = synthetic.run_config(mesh=mesh_cfg, sharding=rules.PRESETS[preset])
    mesh = make_mesh(mesh_cfg, devices)
    optimizer = Optimizer(cfg.optim, steps=1)
    with jax.set_mesh(mesh):
        graphdef, layouts = state_lib.abstract_model(cfg, mesh)
        abstract = state_lib.abstract_state(layouts, optimizer, mesh)
        state = state_lib.initial_state(cfg, optimizer, abstract)
        trained, frozen = optimizer.split(state.params)
        whole = shard.replicated(mesh)
        places = {path: x.sharding for path, x in trained.items()}
        jitted = jax.jit(
            functools.partial(gradients, graphdef, optimizer),
            out_shardings=(whole, whole, places),
            compiler_options=synthetic.FAST_COMPILE,
        )
        batch = shard.global_batch(synthetic.batch(0), synthetic.FRAME_PATCHES, cfg.sharding, mesh)
        loss, _, grads = jitted(trained, frozen, batch)
    wanted = traverse_util.flatten_dict(abstract.params, sep="/")
    assert all(x.sharding == wanted[path].sharding for path, x in grads.items())
    return jax.device_get((loss, grads))


@functools.cache
def on_one_device():
    return loss_and_gradients(MeshConfig(), "dp", jax.devices()[:1])


@pytest.mark.parametrize("preset", sorted(rules.PRESETS))
def test_loss_and_gradients_equal_those_of_one_device(preset):
    want_loss, want_grads = on_one_device()
    loss, grads = loss_and_gradients(MESHES[preset], preset)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    for path, want in want_grads.items():
        error = np.abs(grads[path] - want).max()
        assert error <= 1e-5 * np.abs(want).max() + 1e-8, f"{path}: {error}"
