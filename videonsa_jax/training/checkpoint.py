"""Checkpoints: all of a run, written in the background, complete or absent.

A folder of checkpoints holds one folder per step, with the items `params`, `run` (optimizer state
and counters), `config` and `data` (where each process's data iterator stands). Converted weights
are the same without `run` and `data`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from videonsa_jax.config import parse
from videonsa_jax.config.run import RunConfig
from videonsa_jax.config.schema import ModelConfig
from videonsa_jax.errors import UserError
from videonsa_jax.training import processes
from videonsa_jax.training.state import TrainState

FOLDER = "checkpoints"  # inside a run's working directory
ITEMS = ("params", "run", "config", "data")
CHUNK_BYTES = 64 * 2**20  # stored parts of a parameter: what a reader of one slice has to decode
MUST_AGREE = ("model.", "optim.freeze")  # config fields that a continued run may not change


class Checkpointer:
    """Saves and restores one run."""

    def __init__(self, workdir: str | pathlib.Path, cfg: RunConfig):
        self._cfg = cfg
        self._folder = pathlib.Path(workdir).absolute() / FOLDER
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(max_to_keep=cfg.train.keep),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()  # waits for the save in flight

    def save(self, step: int, state: TrainState, data_state: Any) -> None:
        """Copies the state off the devices, then writes it while training goes on.

        Args:
          step: names the checkpoint; later than those that exist.
          state: of all processes; may be donated as soon as this returns.
          data_state: JSON-able, of this process.
        """
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

    def restore(self, abstract: TrainState) -> tuple[TrainState, Any] | None:
        """The newest complete checkpoint, resharded as `abstract` says, and this process's data.

        The mesh may differ from the one that saved, and the number of processes too, as far as one
        process's data state serves another.

        Returns:
          (state, data state), or None where there is no checkpoint yet.

        Raises:
          UserError: the checkpoint is of another config.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        small = self._manager.restore(
            step,
            args=ocp.args.Composite(config=ocp.args.JsonRestore(), data=ocp.args.JsonRestore()),
        )
        self._check_config(small.config)
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

    def _check_config(self, stored: dict) -> None:
        here = _flat_json(dataclasses.asdict(self._cfg))
        there = _flat_json(stored)
        changed = [
            f"{name}={there.get(name)!r} there, {here.get(name)!r} here"
            for name in sorted(here.keys() | there.keys())
            if name.startswith(MUST_AGREE) and here.get(name) != there.get(name)
        ]
        if changed:
            raise UserError(
                f"{self._folder} holds a run of another config: {'; '.join(changed[:3])}"
                f"{' ...' if changed[3:] else ''}; use its config or another --workdir"
            )


def save_params(folder: str | pathlib.Path, params: dict[str, Any], model: ModelConfig) -> None:
    """Writes weights that belong to no run, for example converted ones.

    Args:
      folder: has no checkpoints yet.
      params: nested, as `nnx.to_pure_dict` gives them.
      model: what they are the parameters of.

    Raises:
      UserError: the folder already holds a checkpoint.
    """
    folder = pathlib.Path(folder).absolute()
    with ocp.CheckpointManager(folder, item_names=ITEMS) as manager:
        if manager.latest_step() is not None:
            raise UserError(f"{folder} already holds checkpoints; choose another folder")
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
    with _open(folder) as manager:
        step = manager.latest_step()
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


def newest_step(folder: str | pathlib.Path) -> int:
    """The step of a folder's newest complete checkpoint.

    Raises:
      UserError: there is none.
    """
    with _open(folder) as manager:
        return manager.latest_step()


def load_model_config(folder: str | pathlib.Path, config_class: type = ModelConfig) -> Any:
    """The model that the newest parameters of a folder belong to.

    Args:
      folder: a run's working directory, or a folder of checkpoints.
      config_class: of its config.

    Raises:
      UserError: there is no checkpoint.
    """
    with _open(folder) as manager:
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        stored = manager.restore(manager.latest_step(), args=args).config
    return parse.build(config_class, stored["model"])


def _open(folder: str | pathlib.Path) -> ocp.CheckpointManager:
    folder = pathlib.Path(folder).absolute()
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    options = ocp.CheckpointManagerOptions(read_only=True)
    handlers = {  # without them, a manager that has saved nothing cannot tell what is stored
        "params": ocp.StandardCheckpointHandler(),
        "run": ocp.StandardCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
    }
    manager = ocp.CheckpointManager(folder, item_handlers=handlers, options=options)
    if manager.latest_step() is None:
        raise UserError(f"{folder}: no complete checkpoint in this folder")
    return manager


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
