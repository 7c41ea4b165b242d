"""The training program on synthetic rows, in processes that a test starts, stops and awaits.

python -m tests.training_program WORKDIR CHANGES PROCESS PROCESSES PORT TIMEOUT_S SECONDS_PER_BATCH
"""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import train
from tests import synthetic
from videonsa_jax.config import parse
from videonsa_jax.config.run import RunConfig
from videonsa_jax.sharding import shard
from videonsa_jax.sharding.mesh import make_mesh
from videonsa_jax.sharding.mesh_config import MeshConfig
from videonsa_jax.training import metrics, processes

ROOT = pathlib.Path(__file__).resolve().parents[1]
TIMEOUT = 300  # seconds; a program that takes longer hangs


@contextlib.contextmanager
def start(
    workdir: pathlib.Path,
    *changes: dict[str, Any],
    devices: int = 1,
    connect_timeout_s: int = TIMEOUT,
    missing: Sequence[int] = (),
    seconds_per_batch: int = 0,
) -> Iterator[list[subprocess.Popen]]:
    """Starts the processes of one run; none is left in the end.

    Args:
      workdir: of the run.
      changes: per process, what differs from a run that saves every step and splits parameters
        over the processes: sections of `RunConfig`.
      devices: of each process.
      connect_timeout_s: seconds that they wait for each other.
      missing: processes that do not start.
      seconds_per_batch: that loading data takes.
    """
    count = len(changes)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # programs that run a few steps
        "PYTHONPATH": str(ROOT),
    }
    with contextlib.ExitStack() as stack:
        programs = []
        for index in range(count):
            if index in missing:
                continue
            numbers = index, count, port, connect_timeout_s, seconds_per_batch
            program = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.training_program"),
                    *(str(workdir), json.dumps(changes[index]), *map(str, numbers)),
                ],
                cwd=ROOT,
                env=os.environ | settings,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(program)
            stack.callback(program.kill)
            programs.append(program)
        yield programs


def outcomes(programs: Sequence[subprocess.Popen]) -> list[tuple[int, str]]:
    """Awaits all; (exit code, last line of standard error) of each."""
    errors = [program.communicate(timeout=TIMEOUT)[1].splitlines() for program in programs]
    codes = [program.returncode for program in programs]
    return [(code, lines[-1] if lines else "") for code, lines in zip(codes, errors, strict=True)]


def complete(workdir: pathlib.Path, changes: dict[str, Any], count: int = 1) -> None:
    """Runs it to its end in `count` processes; fails unless all of them succeed."""
    with start(workdir, *[changes] * count) as programs:
        ended = outcomes(programs)
    assert [code for code, _ in ended] == [0] * count, ended


def await_rows(workdir: pathlib.Path, count: int, program: subprocess.Popen) -> None:
    """Returns when the run has logged that many steps, or the program has ended."""
    deadline = time.monotonic() + TIMEOUT
    while len(metrics.read_rows(workdir)) < count and program.poll() is None:
        assert time.monotonic() < deadline, f"no {count} steps after {TIMEOUT} s"
        time.sleep(0.01)


def main() -> None:
    workdir, changes, *numbers = sys.argv[1:]
    process, count, port, connect_timeout_s, seconds = map(int, numbers)
    with train.exit_codes():
        if count > 1:
            processes.join(f"localhost:{port}", count, process, connect_timeout_s=connect_timeout_s)
        base = synthetic.run_config(train={"save_every": 1}, mesh=MeshConfig(fsdp=count))
        cfg = parse.build(RunConfig, json.loads(changes), base=base)
        processes.check_same_config(cfg)
        share = shard.row_shard(cfg.sharding, make_mesh(cfg.mesh))
        data = synthetic.Batches(share=share, seconds=seconds)
        train.run(cfg, workdir, data=data)


if __name__ == "__main__":
    main()
