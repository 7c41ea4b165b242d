"""Checkpoints come back bit for bit, on any mesh, and never as another model's."""

import contextlib
import dataclasses
import errno
import os
import resource
import shutil

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
from videonsa_jax.training import checkpoint, checkpoint_steps
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


def largest(folder, pattern="ocdbt.process_0/d/*"):
    return max(folder.glob(pattern), key=lambda file: file.stat().st_size)


INCOMPLETE = {
    "empty": lambda step: [shutil.rmtree(step), step.mkdir()],
    "item": lambda step: shutil.rmtree(step / "data"),
    "metadata": lambda step: (step / "params" / "_METADATA").unlink(),
    "step metadata": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "arrays": lambda step: shutil.rmtree(step / "params" / "d"),
    "0 bytes": lambda step: (step / "config" / "metadata").write_bytes(b""),
}


@pytest.mark.parametrize("harm", INCOMPLETE.values(), ids=INCOMPLETE)
def test_an_incomplete_step_is_named_and_passed_over(saved, harm, capfd):
    workdir, state = saved
    folder = workdir / checkpoint.FOLDER
    harm(folder / "4")
    harmed = sorted(folder.rglob("*"))
    assert checkpoint.newest_step(workdir) == 3
    assert checkpoint.load_model_config(workdir) == CFG.model
    line = f"{folder}: step 4 is incomplete ("
    (said,) = [row for row in capfd.readouterr().err.splitlines() if row.startswith(line)]
    assert said.endswith("): left alone; step 3 is used")
    assert sorted(folder.rglob("*")) == harmed
    with Checkpointer(workdir, CFG) as checkpoints:
        _, data_state = checkpoints.restore(abstract_of(state))
        assert data_state == {"next_index": 3}
        checkpoints.save(4, state, {"next_index": "again"})
        checkpoints.save(5, state, {})
    assert sorted(path.name for path in folder.iterdir()) == ["4", "4.incomplete", "5"]
    assert f"{folder / '4'} is saved anew" in capfd.readouterr().err


def test_incomplete_steps_do_not_push_out_complete_ones(saved):
    workdir, state = saved
    folder = workdir / checkpoint.FOLDER
    for step in (7, 8, 9):
        (folder / str(step)).mkdir()
    with Checkpointer(workdir, CFG) as checkpoints:
        checkpoints.save(5, state, {})
    assert sorted(path.name for path in folder.iterdir()) == ["4", "5", "7", "8", "9"]
    assert checkpoint.newest_step(workdir) == 5


DAMAGED = {
    "json": ("config/metadata", "is not JSON", 100),
    "index": ("params/manifest.ocdbt", "Error decoding manifest", 50),
    "arrays": ("params/d/*", "has 50 of", 50),
}


@pytest.mark.parametrize(("pattern", "message", "size"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_step_is_one_line_with_the_step_before(saved, pattern, message, size):
    workdir, state = saved
    folder = workdir / checkpoint.FOLDER
    file = largest(folder / "4", pattern)
    file.write_bytes(file.read_bytes()[:size])
    for read in (
        lambda: Checkpointer(workdir, CFG),
        lambda: checkpoint.load_params(workdir),
        lambda: checkpoint.load_model_config(workdir),
    ):
        with pytest.raises(UserError, match=message) as error:
            read()
        line = str(error.value)
        assert line.startswith(f"{folder}: step 4 is damaged or cannot be read: ")
        assert str(file) in line
        assert line.endswith(f"step 3 is complete: rename or remove {folder / '4'} to use it")
        assert "\n" not in line
    (folder / "4").rename(folder / "bad")
    with Checkpointer(workdir, CFG) as checkpoints:
        assert checkpoints.restore(abstract_of(state))[1] == {"next_index": 3}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax
def test_damage_that_only_reading_the_numbers_shows_is_told_alike(tmp_path):
    params = {"kernel": np.random.default_rng(0).random((64, 64), np.float32)}
    checkpoint.save_params(tmp_path, params, CFG.model)
    file = largest(tmp_path / "0" / "params")
    file.write_bytes(b"x" * file.stat().st_size)
    message = "step 0 is damaged or cannot be read: .*; no step before it is complete"
    with pytest.raises(UserError, match=message):
        checkpoint.load_params(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax
@pytest.mark.parametrize("keep", [None, 0, 0.5], ids=["missing", "empty", "half"])
def test_whatever_file_is_harmed_the_state_is_whole_or_an_error_names_the_step(
    saved, tmp_path_factory, keep
):
    workdir, state = saved
    step = workdir / checkpoint.FOLDER / "4"
    for file in [path.relative_to(workdir) for path in step.rglob("*") if path.is_file()]:
        copy = shutil.copytree(workdir, tmp_path_factory.mktemp("copy") / "run")
        if keep is None:
            (copy / file).unlink()
        else:
            data = (copy / file).read_bytes()
            (copy / file).write_bytes(data[: int(keep * len(data))])
        error = None
        try:
            with Checkpointer(copy, CFG) as checkpoints:
                assert_equal(checkpoints.restore(abstract_of(state))[0], state)
            assert_equal(checkpoint.load_params(copy), state.params)
        except UserError as raised:
            error = str(raised)
        assert error is None or "step 4 is damaged" in error, file


@contextlib.contextmanager
def no_room(size):
    """Writing more than `size` bytes to a file fails, as on a full disk."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax
def test_a_save_that_fails_in_the_background_is_one_line_and_earlier_steps_stay(saved):
    workdir, state = saved
    folder = workdir / checkpoint.FOLDER
    noise = jax.random.normal(jax.random.key(0), (512, 512))
    large = dataclasses.replace(state, params={"text": {"head": {"kernel": noise}}})
    with (
        no_room(500_000),
        pytest.raises(UserError, match="File too large") as error,
        Checkpointer(workdir, CFG) as checkpoints,
    ):
        checkpoints.save(6, large, {})
    line = str(error.value)
    assert line.startswith(f"{folder}: step 6 could not be saved: {folder}/6.")
    assert line.endswith("step 4 is complete: the same command goes on from it")
    assert "\n" not in line
    with Checkpointer(workdir, CFG) as checkpoints:
        assert_equal(checkpoints.restore(abstract_of(state))[0], state)
        checkpoints.save(6, state, {})
    assert checkpoint.newest_step(workdir) == 6


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_error_of_the_file_system_names_the_file(saved, number):
    folder = saved[0] / checkpoint.FOLDER
    message = (
        f"step 4 is damaged or cannot be read: /x/y: {os.strerror(number)}; step 3 is complete"
    )
    with pytest.raises(UserError, match=message), checkpoint_steps.reading(folder, 4):
        raise OSError(number, os.strerror(number), "/x/y")


def test_a_folder_that_vanishes_ends_the_run_at_the_next_save(saved):
    workdir, state = saved
    with Checkpointer(workdir, CFG) as checkpoints:
        (workdir / checkpoint.FOLDER).rename(workdir / "away")
        with pytest.raises(UserError, match=r"step 5 could not be saved: .*; no step is left"):
            checkpoints.save(5, state, {})
    assert not (workdir / checkpoint.FOLDER).exists()
