"""Checkpoints: all of a run, written in the background, complete or absent.

A folder of checkpoints holds one folder per step, with the items `params`, `run` (optimizer state
and counters), `config` and `data` (where each process's data iterator stands). Converted weights
are the same without `run` and `data`.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from videonsa_jax.config import parse
from videonsa_jax.config.run import RunConfig
from videonsa_jax.config.schema import ModelConfig
from videonsa_jax.errors import UserError
from videonsa_jax.training import checkpoint_steps, processes
from videonsa_jax.training.state import TrainState

FOLDER = "checkpoints"  # inside a run's working directory
ITEMS = ("params", "run", "config", "data")
CHUNK_BYTES = 64 * 2**20  # stored parts of a parameter: what a reader of one slice has to decode
MUST_AGREE = ("model.", "optim.freeze")  # config fields that a continued run may not change


class Checkpointer:
    """Saves and restores one run."""

    def __init__(self, workdir: str | pathlib.Path, cfg: RunConfig):
        """Looks which steps are there.

        Raises:
          UserError: a file of the newest complete step is damaged, or the folder cannot be used.
        """
        self._cfg = cfg
        self._folder = pathlib.Path(workdir).absolute() / FOLDER
        self._newest, hidden = processes.from_first(lambda: _survey(self._folder))
        self._names = _CompleteSteps(hidden)
        self._saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=cfg.train.max_to_keep, step_name_format=self._names
        )
        with checkpoint_steps.reading(self._folder):
            self._manager = ocp.CheckpointManager(self._folder, item_names=ITEMS, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self._awaited():
            self._manager.close()  # waits for the save in flight

    def save(self, step: int, state: TrainState, data_state: Any) -> None:
        """Copies the state off the devices, then writes it while training goes on.

        An incomplete folder of that step is moved aside.

        Args:
          step: names the checkpoint; later than those that exist.
          state: of all processes; may be donated as soon as this returns.
          data_state: JSON-able, of this process.

        Raises:
          UserError: this step, or the one before it, cannot be written.
        """
        with self._awaited():
            self._manager.wait_until_finished()
        self._saving = step
        with self._awaited():
            self._folder.stat()  # Orbax would make it anew where a mount has vanished
            if step in self._names.hidden:
                processes.from_first(lambda: _move_aside(self._folder / str(step)))
                self._names.hidden.remove(step)
            run = _without_params(state)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=_in_chunks(state.params),
                    run=ocp.args.StandardSave(run),
                    config=ocp.args.JsonSave(dataclasses.asdict(self._cfg)),
                    data=ocp.args.JsonSave({"processes": processes.gather(data_state)}),
                ),
            )

    def check(self) -> None:
        """Looks how the last save went; does not wait for one that is still being written.

        Raises:
          UserError: it has failed in the background.
        """
        if not self._manager.is_saving_in_progress():
            with self._awaited():
                self._manager.wait_until_finished()

    def _awaited(self) -> contextlib.AbstractContextManager[None]:
        return checkpoint_steps.writing(self._folder, self._saving)

    def restore(self, abstract: TrainState) -> tuple[TrainState, Any] | None:
        """The newest complete checkpoint, resharded as `abstract` says, and this process's data.

        The mesh may differ from the one that saved, and the number of processes too, as far as one
        process's data state serves another.

        Returns:
          (state, data state), or None where there is no checkpoint yet.

        Raises:
          UserError: the checkpoint is of another config, or damaged.
        """
        step = self._newest
        if step is None:
            return None
        with checkpoint_steps.reading(self._folder, step):
            small = self._manager.restore(
                step,
                args=ocp.args.Composite(config=ocp.args.JsonRestore(), data=ocp.args.JsonRestore()),
            )
            self._check_config(step, small.config)
            large = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    run=ocp.args.StandardRestore(_without_params(abstract)),
                ),
            )
            data_states = small.data["processes"]
            data_state = data_states[jax.process_index() % len(data_states)]
            return TrainState(params=large.params, **large.run), data_state

    def _check_config(self, step: int, stored: dict) -> None:
        here = _flat_json(dataclasses.asdict(self._cfg))
        there = _flat_json(stored)
        changed = [
            f"{name}={there.get(name)!r} there, {here.get(name)!r} here"
            for name in sorted(there)  # a field that is newer than the checkpoint changed nothing
            if name.startswith(MUST_AGREE) and here.get(name) != there.get(name)
        ]
        if changed:
            raise UserError(
                f"{self._folder}: step {step} is of another config: {'; '.join(changed[:3])}"
                f"{' ...' if changed[3:] else ''}; use its config or another --workdir"
            )


class _CompleteSteps(ocp.path.step.NameFormat):
    """Steps as Orbax names them, without those that are not complete.

    So Orbax neither reads an incomplete step, nor counts it among those to keep, nor deletes it.
    """

    def __init__(self, hidden: Iterable[int]):
        self.hidden = set(hidden)
        self._standard = ocp.path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        return self._standard.build_name(step)

    def find_all(self, base_path: Any) -> Iterator[Any]:
        return (x for x in self._standard.find_all(base_path) if x.step not in self.hidden)

    def find_step(self, base_path: Any, step: int) -> Any:
        return self._standard.find_step(base_path, step)


def _survey(folder: pathlib.Path) -> list[Any]:
    """The newest complete step, and all that are not complete."""
    newest = checkpoint_steps.newest(folder)
    steps = checkpoint_steps.numbers(folder)
    return [newest, [x for x in steps if not checkpoint_steps.is_complete(folder / str(x))]]


def _move_aside(step: pathlib.Path) -> None:
    names = (f"{step.name}.incomplete{suffix}" for suffix in ("", *map("-{}".format, range(2, 99))))
    aside = next(step.with_name(name) for name in names if not step.with_name(name).exists())
    step.rename(aside)
    sys.stderr.write(f"{step} is saved anew; what was there is now {aside}\n")


def save_params(folder: str | pathlib.Path, params: dict[str, Any], model: ModelConfig) -> None:
    """Writes weights that belong to no run, for example converted ones.

    Args:
      folder: has no checkpoints yet.
      params: nested, as `nnx.to_pure_dict` gives them.
      model: what they are the parameters of.

    Raises:
      UserError: the folder already holds a checkpoint, or cannot be written.
    """
    folder = pathlib.Path(folder).absolute()
    if checkpoint_steps.numbers(folder):
        raise UserError(f"{folder} already holds checkpoints; choose another folder")
    with (
        checkpoint_steps.writing(folder, 0),
        ocp.CheckpointManager(folder, item_names=ITEMS) as manager,
    ):
        manager.save(
            0,
            args=ocp.args.Composite(
                params=_in_chunks(params),
                config=ocp.args.JsonSave({"model": dataclasses.asdict(model)}),
            ),
        )


def load_params(
    folder: str | pathlib.Path,
    abstract: dict[str, Any] | None = None,
    *,
    may_lack: Callable[[str], bool] = lambda path: False,
) -> dict:
    """The newest parameters of a folder.

    Args:
      folder: a run's working directory, or a folder of checkpoints.
      abstract: nested `jax.ShapeDtypeStruct`s, their shardings respected; None loads what is there
        as host arrays on one device.
      may_lack: which of them, by "/"-joined path, are left out where the folder has none.

    Raises:
      UserError: there is no checkpoint, or its parameters have other names or shapes.
    """
    with _opened(folder) as (manager, step):
        stored = manager.item_metadata(step).params.tree
        if abstract is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), stored
            )
        there = traverse_util.flatten_dict(stored, sep="/")
        wanted = traverse_util.flatten_dict(abstract, sep="/")
        wanted = {path: x for path, x in wanted.items() if path in there or not may_lack(path)}
        _check_shapes(manager.directory, there, wanted)
        abstract = traverse_util.unflatten_dict(wanted, sep="/")
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        return manager.restore(step, args=args).params


def load_model_config(folder: str | pathlib.Path, config_class: type = ModelConfig) -> Any:
    """The model that the newest parameters of a folder belong to.

    Args:
      folder: a run's working directory, or a folder of checkpoints.
      config_class: of its config.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    with _opened(folder) as (manager, step):
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        stored = manager.restore(step, args=args).config
        return parse.build(config_class, stored["model"])


def newest_step(folder: str | pathlib.Path) -> int:
    """The step of a folder's newest complete checkpoint.

    Raises:
      UserError: there is none, or it is damaged.
    """
    return int(newest_folder(folder).name)


def newest_folder(folder: str | pathlib.Path) -> pathlib.Path:
    """The folder of the newest complete step; on all processes the one that process 0 finds.

    Args:
      folder: a run's working directory, or a folder of checkpoints.

    Raises:
      UserError: there is none, or it is damaged.
    """
    folder = pathlib.Path(folder).absolute()

    def find() -> str:
        with checkpoint_steps.reading(folder):
            inner = folder / FOLDER if (folder / FOLDER).is_dir() else folder
            if not inner.is_dir():
                raise UserError(f"{inner}: no such folder")
        step = checkpoint_steps.newest(inner)
        if step is None:
            raise UserError(f"{inner}: no complete checkpoint in this folder")
        return str(inner / str(step))

    return pathlib.Path(processes.from_first(find))


@contextlib.contextmanager
def _opened(folder: str | pathlib.Path) -> Iterator[tuple[ocp.CheckpointManager, int]]:
    """The newest complete step; errors inside are told as those of reading it."""
    newest = newest_folder(folder)
    folder, step = newest.parent, int(newest.name)
    handlers = {  # without them, a manager that has saved nothing cannot tell what is stored
        "params": ocp.StandardCheckpointHandler(),
        "run": ocp.StandardCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(read_only=True, lightweight_initialize=True)
    with (
        checkpoint_steps.reading(folder, step),
        ocp.CheckpointManager(folder, item_handlers=handlers, options=options) as manager,
    ):
        yield manager, step


def _in_chunks(params: dict[str, Any]) -> ocp.args.StandardSave:
    chunks = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
    return ocp.args.StandardSave(params, save_args=jax.tree.map(lambda _: chunks, params))


def _check_shapes(folder: Any, there: dict, here: dict) -> None:
    wrong = [f"{path} is missing" for path in sorted(here.keys() - there.keys())]
    wrong += [f"{path} is not in the model" for path in sorted(there.keys() - here.keys())]
    wrong += [
        f"{path} is {tuple(there[path].shape)} there, {tuple(here[path].shape)} here"
        for path in sorted(here.keys() & there.keys())
        if tuple(there[path].shape) != tuple(here[path].shape)
    ]
    if wrong:
        raise UserError(
            f"{folder} is a checkpoint of another model: {'; '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if wrong[3:] else ''}; use its config"
        )


def _without_params(state: TrainState) -> dict[str, Any]:
    return {
        field.name: getattr(state, field.name)
        for field in dataclasses.fields(state)
        if field.name != "params"
    }


def _flat_json(config: dict) -> dict[str, Any]:
    """Dotted names and JSON values, so that a stored config and a live one compare equal."""
    return traverse_util.flatten_dict(json.loads(json.dumps(config)), sep=".")
