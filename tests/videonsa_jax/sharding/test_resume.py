"""A stopped run goes on bit for bit under every strategy, and what it saved is read on any mesh."""

import shutil

import jax
import numpy as np
import pytest

import train
from tests import synthetic
from videonsa_jax.config.run import RunConfig
from videonsa_jax.config.schema import ComputeConfig
from videonsa_jax.sharding import rules
from videonsa_jax.sharding.mesh import make_mesh
from videonsa_jax.sharding.mesh_config import MeshConfig
from videonsa_jax.training import checkpoint, metrics
from videonsa_jax.training import state as state_lib
from videonsa_jax.training.checkpoint import Checkpointer
from videonsa_jax.training.optimizer import Optimizer
from videonsa_jax.training.state import TrainState

pytestmark = pytest.mark.slow

# How a state may lie: by every preset, and on fewer devices.
PLACES = {name: (name, mesh, 8) for name, mesh in synthetic.MESHES.items()}
PLACES |= {"four": ("fsdp", MeshConfig(fsdp=4), 4), "one": ("dp", MeshConfig(), 1)}


@pytest.fixture(scope="module", autouse=True)
def _quick_compiles():
    """Of programs that run a few steps."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def config(preset: str, mesh: MeshConfig) -> RunConfig:
    mode = "ring" if preset == "fsdp_tp_cp" else "gather"
    return synthetic.run_config(
        train={"steps": 3},
        mesh=mesh,
        sharding=rules.PRESETS[preset],
        compute=ComputeConfig(dtype="float32", remat="none", cp_mode=mode),
    )


@pytest.mark.parametrize("preset", sorted(rules.PRESETS))
def test_a_killed_run_continues_bit_for_bit(tmp_path, preset):
    cfg = config(preset, synthetic.MESHES[preset])
    want = train.run(cfg, tmp_path, data=synthetic.Batches())
    losses = [row["loss"] for row in metrics.read_rows(tmp_path)]
    # What is left of a run that is killed in its last step.
    shutil.rmtree(tmp_path / checkpoint.FOLDER / "3")
    assert checkpoint.newest_step(tmp_path) == 2
    assert_equal(train.run(cfg, tmp_path, data=synthetic.Batches()), want)
    assert [row["loss"] for row in metrics.read_rows(tmp_path)] == losses


def abstract_state(place: str) -> TrainState:
    preset, mesh_cfg, devices = PLACES[place]
    cfg = config(preset, mesh_cfg)
    mesh = make_mesh(mesh_cfg, jax.devices()[:devices])
    _, layouts = state_lib.abstract_model(cfg, mesh)
    return state_lib.abstract_state(layouts, Optimizer(cfg.optim, cfg.train.steps), mesh)


def drawn_state(abstract: TrainState) -> TrainState:
    """Its numbers do not depend on where they lie."""
    rng = np.random.default_rng(0)

    def draw(x):
        return jax.device_put((100 * rng.standard_normal(x.shape)).astype(x.dtype), x.sharding)

    return jax.tree.map(draw, abstract)


def assert_equal(got: TrainState, want: TrainState) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_saved_on_one_mesh_is_restored_on_all(tmp_path, place):
    preset, mesh, _ = PLACES[place]
    with Checkpointer(tmp_path, config(preset, mesh)) as checkpoints:
        checkpoints.save(1, drawn_state(abstract_state(place)), {})
    want = jax.device_get(drawn_state(abstract_state("one")))
    for other, (preset, mesh, _) in PLACES.items():
        abstract = abstract_state(other)
        with Checkpointer(tmp_path, config(preset, mesh)) as checkpoints:
            state, _ = checkpoints.restore(abstract)
        assert_equal(state, want)
        places = jax.tree.map(lambda x, y: x.sharding == y.sharding, state, abstract)
        assert jax.tree.all(places), other
