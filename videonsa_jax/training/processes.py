"""The processes of one run: how they find each other, and what they must agree on."""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from videonsa_jax.config import parse
from videonsa_jax.config.run import RunConfig
from videonsa_jax.errors import UserError
from videonsa_jax.training import rendezvous

CONNECT_TIMEOUT_S = 300  # seconds that a process waits for the others
SHOWN = 3  # fields that differ


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
) -> None:
    """Connects the processes of one run; does nothing for a run of one process.

    Must come before anything asks JAX for devices. Each value left at None is read from
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES or JAX_PROCESS_ID. `coordinator="auto"` lets JAX ask
    the cluster (Cloud TPU, Slurm, Open MPI, Kubernetes).

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: of the run.
      process_id: which of them this is.
      connect_timeout_s: seconds to wait for process 0, and then for all.

    Raises:
      UserError: some of the three are given and some are not, or they make no sense, or process 0
        cannot be reached, or others did not come to it, or there is no cluster to ask.
    """
    if coordinator == "auto":
        _ask_cluster(connect_timeout_s)
        return
    env = os.environ
    settings = {
        "coordinator": coordinator or env.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _number(num_processes, "JAX_NUM_PROCESSES"),
        "process_id": _number(process_id, "JAX_PROCESS_ID"),
    }
    missing = [name for name, value in settings.items() if value is None]
    if len(missing) == len(settings):
        return
    if missing:
        raise UserError(f"--{missing[0]} is missing: a run of several processes needs all three")
    address, count, index = settings.values()
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} must be in 0..{count - 1}: --num_processes={count}")
    rendezvous.wait_for_peers(address, count, index, connect_timeout_s)
    jax.distributed.initialize(address, count, index, initialization_timeout=int(connect_timeout_s))


def _ask_cluster(connect_timeout_s: float) -> None:
    try:
        jax.distributed.initialize(initialization_timeout=int(connect_timeout_s))
    except ValueError as error:
        raise UserError(
            f"--coordinator=auto: JAX knows no cluster here ({error}); give "
            "--coordinator=HOST:PORT, --num_processes and --process_id"
        ) from error


def _number(flag: int | None, variable: str) -> int | None:
    """The flag's value, else the environment variable's."""
    text = os.environ.get(variable)
    if flag is not None or text is None:
        return flag
    if not text.isdecimal():
        raise UserError(f"{variable}={text} must be a number")
    return int(text)


def gather(value: Any) -> list[Any]:
    """Each process's JSON-able value, on all of them."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, lengths.max() - len(text)))
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(texts, lengths, strict=True)]


def from_first(find: Callable[[], Any]) -> Any:
    """What process 0 finds, JSON-able, on all of them; the others do not look.

    Raises:
      UserError: process 0's, on every process.
    """
    found = cause = None
    if jax.process_index() == 0:
        try:
            found = find()
        except UserError as error:
            cause = error
    found, message = gather([found, None if cause is None else str(cause)])[0]
    if message is not None:
        raise UserError(message) from cause
    return found


def check_same_config(cfg: RunConfig) -> None:
    """Compares the configs of all processes.

    Raises:
      UserError: they differ; on every process, and all with the same line.
    """
    configs = gather({name: repr(value) for name, value in parse.flatten(cfg).items()})
    names = sorted(set().union(*configs))
    differing = [name for name in names if len({config.get(name) for config in configs}) > 1]
    if differing:
        values = (
            f"{name}=" + ", ".join(f"{config.get(name)} in process {i}" for i, config in pairs)
            for name, pairs in ((name, _distinct(configs, name)) for name in differing[:SHOWN])
        )
        raise UserError(
            f"the processes have different configs: {'; '.join(values)}"
            f"{' ...' if differing[SHOWN:] else ''}; start the same command everywhere"
        )


def _distinct(configs, name):
    """The first process with each value of a field."""
    first = {}
    for i, config in enumerate(configs):
        first.setdefault(config.get(name), (i, config))
    return first.values()
