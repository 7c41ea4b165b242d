"""Checkpoints come back bit for bit, on any mesh, and never as another model's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests import synthetic
from videonsa_jax.config import schema as config
from videonsa_jax.errors import UserError
from videonsa_jax.sharding.mesh import make_mesh
from videonsa_jax.sharding.mesh_config import MeshConfig
from videonsa_jax.training import checkpoint
from videonsa_jax.training.checkpoint import Checkpointer
from videonsa_jax.training.optimizer import Optimizer
from videonsa_jax.training.state import TrainState

CFG = synthetic.run_config()


def make_state(seed: int, mesh_cfg: MeshConfig, spec: PartitionSpec) -> TrainState:
    """Two parameters with optimizer moments, sharded."""
    mesh = make_mesh(mesh_cfg)
    kernel, scale = jax.random.normal(jax.random.key(seed), (2, 16, 8))
    params = {
        "text": {"head": {"kernel": jax.device_put(kernel, NamedSharding(mesh, spec))}},
        "vision": {"merger": {"norm": {"scale": scale[0]}}},
    }
    optimizer = Optimizer(CFG.optim, steps=4)
    tx = optimizer.transformation()
    trained, _ = optimizer.split(params)
    grads = jax.tree.map(jnp.cos, trained)
    _, opt_state = tx.update(grads, tx.init(trained), trained)
    return TrainState(jnp.int32(seed), jnp.int32(1), jnp.int32(0), params, opt_state)


def abstract_of(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture
def saved(tmp_path):
    """A run's folder with checkpoints of steps 2, 3 and 4, of which the last two are kept."""
    state = make_state(4, MeshConfig(fsdp=8), PartitionSpec("fsdp"))
    with Checkpointer(tmp_path, CFG) as checkpoints:
        assert checkpoints.restore(abstract_of(state)) is None
        for step in (2, 3, 4):
            checkpoints.save(step, state, {"next_index": step})
    return tmp_path, state


def test_a_state_comes_back_bit_for_bit_on_another_mesh(saved):
    workdir, state = saved
    like = make_state(0, MeshConfig(data=2, fsdp=4), PartitionSpec(None, "fsdp"))
    with Checkpointer(workdir, CFG) as checkpoints:
        restored, data_state = checkpoints.restore(abstract_of(like))
    assert data_state == {"next_index": 4}
    assert_equal(restored, state)
    assert restored.params["text"]["head"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp")


def test_the_last_ones_are_kept(saved):
    workdir, _ = saved
    folder = workdir / checkpoint.FOLDER
    assert sorted(path.name for path in folder.iterdir()) == ["3", "4"]
    assert checkpoint.newest_step(workdir) == 4


def test_an_unfinished_checkpoint_is_not_seen(saved):
    workdir, state = saved
    folder = workdir / checkpoint.FOLDER
    (folder / "5.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert checkpoint.newest_step(workdir) == 4
    with Checkpointer(workdir, CFG) as checkpoints:
        restored, _ = checkpoints.restore(abstract_of(state))
        assert_equal(restored, state)
        checkpoints.save(5, state, {})
    assert checkpoint.newest_step(workdir) == 5


def test_saved_numbers_are_those_at_the_call_though_the_state_is_donated(tmp_path):
    large = {"text": {"head": {"kernel": jnp.zeros((2048, 2048))}}}
    count = jnp.int32(0)
    double = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
    with Checkpointer(tmp_path, CFG) as checkpoints:
        for step in range(3):
            checkpoints.save(step, TrainState(count, count, count, large, ()), {})
            large = double(large)
    kernel = checkpoint.load_params(tmp_path)["text"]["head"]["kernel"]
    np.testing.assert_array_equal(kernel, np.full((2048, 2048), 2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "model": (
            {"model": config.PRESETS["qwen2_5_vl_3b"]},
            r"another config: model.nsa.block_count=2 there, 32 here; .* \.\.\.; use its config",
        ),
        "freeze": (
            {"optim": dataclasses.replace(CFG.optim, freeze=("vision",))},
            r"another config: optim.freeze=\[\] there, \['vision'\] here; use its config",
        ),
    }.values(),
    ids=["model", "freeze"],
)
def test_a_run_of_another_config_is_not_continued(saved, change, message):
    workdir, state = saved
    other = dataclasses.replace(CFG, **change)
    with (
        Checkpointer(workdir, other) as checkpoints,
        pytest.raises(UserError, match=message) as error,
    ):
        checkpoints.restore(abstract_of(state))
    assert "\n" not in str(error.value)


def test_length_and_learning_rate_may_change(saved):
    workdir, state = saved
    longer = synthetic.run_config(train={"steps": 100}, optim={"lr": 1.0})
    with Checkpointer(workdir, longer) as checkpoints:
        assert checkpoints.restore(abstract_of(state)) is not None


def test_parameters_load_without_the_run(saved):
    workdir, state = saved
    assert_equal(checkpoint.load_params(workdir), state.params)
    assert_equal(checkpoint.load_params(workdir / checkpoint.FOLDER), state.params)
    assert checkpoint.load_model_config(workdir) == CFG.model


def test_parameters_of_another_model_are_named(saved):
    workdir, _ = saved
    like = {"text": {"head": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}, "x": 1}}
    like["text"]["x"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    message = (
        r"another model: text/x is missing; vision/merger/norm/scale is not in the model; "
        r"text/head/kernel is \(16, 8\) there, \(8, 8\) here; use its config"
    )
    with pytest.raises(UserError, match=message):
        checkpoint.load_params(workdir, like)


def test_weights_of_no_run_are_saved_once(tmp_path):
    params = {"text": {"norm": {"scale": np.arange(4.0, dtype=np.float32)}}}
    checkpoint.save_params(tmp_path / "weights", params, CFG.model)
    assert_equal(checkpoint.load_params(tmp_path / "weights"), params)
    assert checkpoint.load_model_config(tmp_path / "weights") == CFG.model
    with pytest.raises(UserError, match="already holds checkpoints; choose another folder"):
        checkpoint.save_params(tmp_path / "weights", params, CFG.model)


@pytest.mark.parametrize(("name", "reason"), [("none", "no such folder"), (".", "no complete")])
def test_a_folder_without_checkpoint_is_named(tmp_path, name, reason):
    with pytest.raises(UserError, match=reason):
        checkpoint.load_params(tmp_path / name)
