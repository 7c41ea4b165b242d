"""Trains a model, or continues where a killed run stopped.

python train.py --config=configs/X.py[:variant] --workdir=DIR [--config.section.field=VALUE]
    [--dry_run] [--coordinator=HOST:PORT --num_processes=N --process_id=I]
"""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from convert import load
from videonsa_jax.aot import estimate, programs
from videonsa_jax.config import parse
from videonsa_jax.config.run import RunConfig
from videonsa_jax.data import pipeline
from videonsa_jax.errors import UserError, file_errors
from videonsa_jax.sharding import mesh as meshes
from videonsa_jax.sharding import shard
from videonsa_jax.training import (
    checkpoint,
    checkpoint_steps,
    metrics,
    preemption,
    processes,
    profiling,
    workdir_lock,
)
from videonsa_jax.training import state as state_lib
from videonsa_jax.training.optimizer import Optimizer, is_adapter
from videonsa_jax.training.preemption import Preempted
from videonsa_jax.training.state import TrainState
from videonsa_jax.training.step import CompiledStep


class DataIterator(Protocol):
    """Endless batches as dicts of the array fields of `Batch`; see `data.pipeline.Batches`."""

    frame_patches: int

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...

    def close(self) -> None: ...


def main(argv: Sequence[str]) -> None:
    """Reads flags, then trains."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    checkpoint_steps.quiet()
    args = flags.FLAGS
    with exit_codes():
        processes.join(args.coordinator, args.num_processes, args.process_id)
        cfg = parse.parse(parse.load_config(args.config), args.override)
        processes.check_same_config(cfg)
        if args.dry_run:
            print(describe(cfg))
        elif args.workdir is None:
            raise UserError("--workdir is not set; it is the folder that the run writes to")
        else:
            run(cfg, args.workdir)


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """One line and a code for the ways in which a run ends early."""
    try:
        yield
    except UserError as error:
        sys.exit(f"train.py: {error}")
    except Preempted as reason:
        print(f"train.py: {reason}", file=sys.stderr)
        sys.exit(preemption.EXIT_CODE)


def describe(cfg: RunConfig) -> str:
    """The resolved config, the mesh, every parameter's place on it, and the memory of a step.

    Needs no devices.

    Raises:
      UserError: the mesh does not fit the model or the rows of a step.
    """
    mesh = meshes.abstract_mesh(cfg.mesh)
    fields = [f"{name} = {value!r}" for name, value in parse.flatten(cfg).items()]
    _, layouts = state_lib.abstract_model(cfg, mesh)
    return "\n".join(
        [
            *fields,
            "",
            f"mesh {dict(mesh.shape)}",
            "",
            shard.describe_layouts(layouts),
            "",
            *_describe_memory(cfg, mesh),
        ]
    )


def _describe_memory(cfg: RunConfig, mesh: AbstractMesh) -> Iterator[str]:
    vision, text = max(cfg.data.buckets, key=sum)
    split = NamedSharding(mesh, cfg.sharding.spec("batch", "seq"))
    for slots in (vision, text):
        shard.check_split("config.data.batch", cfg.data.batch, slots, split)
    shape = programs.RowShape(cfg.data.batch, vision, text)
    kinds = dataclasses.asdict(estimate.kinds_of_memory(cfg, mesh, shape, "train"))
    yield f"memory of one device, GiB, with {cfg.data.batch} rows of {vision} + {text} slots"
    for kind, size in kinds.items():
        yield f"{kind:<12} {size / 2**30:9.2f}"
    yield f"{'known so far':<12} {sum(kinds.values()) / 2**30:9.2f}"
    yield (
        "What the compiler needs besides, it says itself, for devices that need not be there: "
        "make sharding-report (docs/training.md)"
    )


def run(
    cfg: RunConfig,
    workdir: str | pathlib.Path,
    *,
    data: DataIterator | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> TrainState:
    """Trains to `cfg.train.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
      cfg: the whole run.
      workdir: shared by all processes.
      data: this process's rows; None opens `cfg.data`. Closed in the end.
      devices: to use; None is all of them.

    Returns:
      The final state.

    Raises:
      UserError: what the user can mend: another run in `workdir`, too many non-finite steps in a
        row, a full disk, a damaged checkpoint.
      Preempted: the machine asked the run to stop, and everything is saved.
    """
    workdir = pathlib.Path(workdir)
    mesh = meshes.make_mesh(cfg.mesh, devices)
    with (
        workdir_lock.held(workdir),
        file_errors(workdir, lambda: checkpoint_steps.remaining(workdir / checkpoint.FOLDER)),
        jax.set_mesh(mesh),
        checkpoint.Checkpointer(workdir, cfg) as checkpoints,
        contextlib.closing(data or _open_data(cfg, workdir, mesh)) as data,
    ):
        state, step_fn = _begin(cfg, mesh, checkpoints, data)
        first, last = int(state.step), cfg.train.steps
        active = jax.process_index() == 0
        with (
            metrics.TrainLogger(workdir, first, last, active=active) as report,
            profiling.StepProfiler(workdir, cfg.train.profile) as profile,
            preemption.PreemptionHandler() as preemption_handler,
        ):
            size = sum(x.size for x in jax.tree.leaves(state.params))
            where = f"{mesh.size} {jax.default_backend()} device(s)"
            report.say(f"{size:,} parameters on {where}, from step {first} to {last}")
            for step in range(first + 1, last + 1):
                checkpoints.check()
                with report.timed("data"):
                    arrays = next(data)
                batch = shard.global_batch(arrays, data.frame_patches, cfg.sharding, mesh)
                if (seconds := step_fn.compile(state, batch)) is not None:
                    report.compiled(batch, seconds)
                with profile.step(step), report.timed("step"):
                    state, scalars = step_fn(state, batch)
                    scalars = jax.device_get(scalars)
                if scalars["consecutive_bad"] >= cfg.train.max_consecutive_nonfinite:
                    raise _too_many_bad(workdir, step, arrays, cfg)
                report.step(step, scalars, log=step % cfg.train.log_every == 0 or step == last)
                stop = step < last and preemption_handler.reached(step)
                if stop or step % cfg.train.save_every == 0 or step == last:
                    with report.timed("checkpoint"):
                        checkpoints.save(step, state, data.get_state())
                if stop:
                    raise Preempted(f"asked to stop; step {step} of {last} is saved in {workdir}")
    return state


def _open_data(cfg: RunConfig, workdir: pathlib.Path, mesh: Mesh) -> DataIterator:
    process, share = jax.process_index(), shard.row_shard(cfg.sharding, mesh)
    name = f"bad_samples_process{process}.jsonl" if process else "bad_samples.jsonl"
    return pipeline.make_dataset(
        cfg.data,
        cfg.model,
        bad_samples=workdir / name,
        shard_index=share.index,
        num_shards=share.count,
    )


def _begin(
    cfg: RunConfig, mesh: Mesh, checkpoints: checkpoint.Checkpointer, data: DataIterator
) -> tuple[TrainState, CompiledStep]:
    """The state to go on from, with `data` moved to the same place, and the step function."""
    optimizer = Optimizer(cfg.optim, cfg.train.steps)
    graphdef, layouts = state_lib.abstract_model(cfg, mesh)
    abstract = state_lib.abstract_state(layouts, optimizer, mesh)
    step_fn = CompiledStep(graphdef, optimizer, state_lib.shardings(abstract), mesh)
    restored = checkpoints.restore(abstract)
    if restored is not None:
        state, position = restored
        data.set_state(position)
        return state, step_fn
    source = cfg.train.init_from
    weights = None
    if source is not None and load.is_hf(source):
        weights = load.load_hf(source, cfg.model, abstract.params, seed=cfg.seed)
    elif source is not None:
        weights = checkpoint.load_params(source, abstract.params, may_lack=is_adapter)
    return state_lib.initial_state(cfg, optimizer, abstract, weights), step_fn


def _too_many_bad(
    workdir: pathlib.Path, step: int, arrays: dict[str, Any], cfg: RunConfig
) -> UserError:
    file = workdir / f"bad_batch_step{step}_process{jax.process_index()}.npz"
    np.savez(file, **arrays)
    return UserError(
        f"step {step}: the loss or gradient of {cfg.train.max_consecutive_nonfinite} steps in a "
        f"row was not finite; the batch is in {file}; look at it or lower "
        f"config.optim.lr={cfg.optim.lr}"
    )


def define_flags() -> None:
    """Not at import: one process may import several programs, whose flags share names."""
    parse.define_config_flags()
    flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, curves")
    flags.DEFINE_bool("dry_run", False, "print the resolved config and the parameters, then exit")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, or 'auto' on a known cluster")
    flags.DEFINE_integer("num_processes", None, "processes of the run")
    flags.DEFINE_integer("process_id", None, "which of them this is")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=lambda argv: flags.FLAGS(parse.override_flags(argv)))
