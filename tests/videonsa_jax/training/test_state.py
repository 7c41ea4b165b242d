"""A state is born sharded, and the optimizer's moments lie where their parameters lie."""

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from tests import synthetic
from videonsa_jax.sharding import rules
from videonsa_jax.sharding.mesh import make_mesh
from videonsa_jax.sharding.mesh_config import MeshConfig
from videonsa_jax.training import state as state_lib
from videonsa_jax.training.optimizer import Optimizer, group_of


def abstract_of(cfg, devices=None):
    mesh = make_mesh(cfg.mesh, devices)
    optimizer = Optimizer(cfg.optim, cfg.train.steps)
    _, layouts = state_lib.abstract_model(cfg, mesh)
    return mesh, optimizer, state_lib.abstract_state(layouts, optimizer, mesh)


@pytest.mark.parametrize("preset", ["fsdp", "fsdp_tp"])
def test_moments_are_sharded_like_their_parameters(preset):
    mesh = MeshConfig(fsdp=8) if preset == "fsdp" else MeshConfig(fsdp=4, tensor=2)
    cfg = synthetic.run_config(mesh=mesh, sharding=rules.PRESETS[preset])
    _, _, state = abstract_of(cfg)
    params = traverse_util.flatten_dict(state.params, sep="/")
    for name in ("mu", "nu"):
        moments = optax.tree.get(state.opt_state, name)
        assert {path: x.sharding for path, x in moments.items()} == {
            path: x.sharding for path, x in params.items()
        }
    split = {axis for x in params.values() for axis in x.sharding.spec if axis}
    assert split == ({"fsdp"} if preset == "fsdp" else {"fsdp", "tensor"})


def test_frozen_groups_have_no_moments():
    cfg = synthetic.run_config(optim={"freeze": ("vision", "merger")})
    _, _, state = abstract_of(cfg, jax.devices()[:1])
    moments = optax.tree.get(state.opt_state, "mu")
    assert {group_of(path) for path in moments} == {"decoder", "gates"}


def test_random_parameters_do_not_depend_on_the_mesh():
    states = []
    for mesh_cfg, devices in ((MeshConfig(), jax.devices()[:1]), (MeshConfig(fsdp=8), None)):
        cfg = synthetic.run_config(mesh=mesh_cfg)
        mesh, optimizer, abstract = abstract_of(cfg, devices)
        with jax.set_mesh(mesh):
            states.append(state_lib.initial_state(cfg, optimizer, abstract))
    jax.tree.map(np.testing.assert_array_equal, *states)
    kernel = states[1].params["text"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // 8
