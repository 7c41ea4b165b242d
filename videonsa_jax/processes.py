"""The processes of one run: how they find each other, and what they must agree on."""

import json
import os
import socket
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from videonsa_jax import parse
from videonsa_jax.errors import UserError
from videonsa_jax.parse import RunConfig

PATIENCE = 300  # seconds that a process waits for the others
SHOWN = 3  # fields that differ


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    patience: float = PATIENCE,
) -> None:
    """Connects the processes of one run; does nothing for a run of one process.

    Must come before anything asks JAX for devices. Each value left at None is read from
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES or JAX_PROCESS_ID. `coordinator="auto"` lets JAX ask
    the cluster (Cloud TPU, Slurm, Open MPI, Kubernetes).

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: of the run.
      process_id: which of them this is.
      patience: seconds to wait for process 0, and then for all.

    Raises:
      UserError: some of the three are given and some are not, or they make no sense, or process 0
        cannot be reached.
    """
    if coordinator == "auto":
        jax.distributed.initialize(initialization_timeout=int(patience))
        return
    env = os.environ
    settings = {
        "coordinator": coordinator or env.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _first(num_processes, env.get("JAX_NUM_PROCESSES")),
        "process_id": _first(process_id, env.get("JAX_PROCESS_ID")),
    }
    missing = [name for name, value in settings.items() if value is None]
    if len(missing) == len(settings):
        return
    if missing:
        raise UserError(f"--{missing[0]} is missing: a run of several processes needs all three")
    address, count, index = settings.values()
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} must be in 0..{count - 1}: --num_processes={count}")
    if index:
        # JAX ends the whole process, with a stack trace, when it cannot reach the coordinator.
        _await(address, patience)
    jax.distributed.initialize(address, count, index, initialization_timeout=int(patience))


def _first(flag: int | None, text: str | None) -> int | None:
    if flag is not None:
        return flag
    return None if text is None else int(text)


def _await(address: str, patience: float) -> None:
    """Returns when something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={address} must be HOST:PORT of process 0")
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator={address} was not reached within {patience:.0f} s ({error}); "
                    "is process 0 running, and its port open?"
                ) from error
            time.sleep(min(1, patience / 10))


def gather(value: Any) -> list[Any]:
    """Each process's JSON-able value, on all of them."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, lengths.max() - len(text)))
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(texts, lengths, strict=True)]


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
