"""The training program: it goes on where it was killed, bit for bit, and says what is wrong."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import train
from tests import synthetic
from videonsa_jax import checkpoint, metrics, preemption, profiling
from videonsa_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(
        model="tiny",
        data=dict(source=("none.jsonl",), tokenizer="none", batch=64),
        train=dict(steps=4),
        mesh=dict(fsdp=64),
    ))
"""

RUN = """
import sys
from tests import synthetic
import train
from videonsa_jax import processes
from videonsa_jax.config import MeshConfig

workdir = sys.argv[1]
steps, process, count, port, seed = map(int, sys.argv[2:])
with train.exit_codes():
    if count > 1:
        processes.join(f"localhost:{port}", count, process)
    cfg = synthetic.run_config(
        train={"steps": steps, "save_every": 1}, mesh=MeshConfig(fsdp=count), seed=seed
    )
    processes.check_same_config(cfg)
    train.run(cfg, workdir, data=synthetic.Batches(process=process, processes=count))
"""


def run(workdir, *, data=None, **train_fields):
    cfg = synthetic.run_config(train=train_fields)
    return train.run(cfg, workdir, data=data or synthetic.Batches(), devices=jax.devices()[:1])


def start_program(workdir, *, steps, process=0, processes=1, port=0, seed=0) -> subprocess.Popen:
    """The run of `RUN` in a process of its own, with one device."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, (workdir, steps, process, processes, port, seed))],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(workdir, *, steps, seeds=(0, 0)) -> list[subprocess.Popen]:
    """Two processes of one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        settings = {"steps": steps, "processes": 2, "port": free.getsockname()[1]}
    return [start_program(workdir, process=i, seed=seeds[i], **settings) for i in (0, 1)]


def command(tmp_path, *args) -> subprocess.CompletedProcess:
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    return subprocess.run(
        [sys.executable, "train.py", f"--config={config}", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_same_bits(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_stopped_run_continues_bit_for_bit(tmp_path):
    want = run(tmp_path / "whole")
    with pytest.raises(InterruptedError, match="batch 3"):
        run(tmp_path / "stopped", data=synthetic.Batches(end=3))
    assert checkpoint.newest_step(tmp_path / "stopped") == 2
    got = run(tmp_path / "stopped")
    assert_same_bits(got, want)
    assert_same_bits(checkpoint.load_params(tmp_path / "stopped"), want.params)
    whole, continued = (metrics.read_rows(tmp_path / name) for name in ("whole", "stopped"))
    assert [row["step"] for row in continued] == [1, 2, 3, 4]
    assert [row["loss"] for row in continued] == [row["loss"] for row in whole]


def test_a_finished_run_does_nothing(tmp_path, capsys):
    want = run(tmp_path)
    capsys.readouterr()
    assert_same_bits(run(tmp_path, data=synthetic.Batches(end=0)), want)
    assert capsys.readouterr().out.splitlines() == [
        f"{sum(x.size for x in jax.tree.leaves(want.params)):,} parameters on 1 cpu device(s), "
        "from step 4 to 4"
    ]


def test_too_many_bad_batches_stop_the_run_and_leave_the_last_one(tmp_path):
    data = synthetic.Batches(bad_from=1)
    with pytest.raises(UserError, match=r"step 4: the loss or gradient of 3 steps in a row"):
        run(tmp_path, data=data, max_consecutive_bad=3)
    with np.load(tmp_path / "bad_batch_step4_process0.npz") as saved:
        assert np.isnan(saved["patches"]).all()
        np.testing.assert_array_equal(saved["text_tokens"], synthetic.batch(3)["text_tokens"])
    assert [row["loss"] is None for row in metrics.read_rows(tmp_path)] == [False, True, True]


def test_a_run_starts_from_given_weights(tmp_path):
    weights = run(tmp_path / "first").params
    checkpoint.save_params(tmp_path / "weights", weights, synthetic.MODEL)
    data = synthetic.Batches(bad_from=0)  # no update is made
    state = run(tmp_path / "second", data=data, init_from=str(tmp_path / "weights"))
    assert_same_bits(state.params, weights)
    assert state.skipped == 4


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(tmp_path):
    class Batches(synthetic.Batches):
        def __next__(self):
            if self.next_index == 2:
                signal.raise_signal(signal.SIGTERM)  # while step 3 is prepared
            return super().__next__()

    want = run(tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(preemption.Preempted, match="asked to stop; step 3 of 4 is saved in"):
        run(tmp_path / "stopped", data=Batches(), save_every=4)
    assert checkpoint.newest_step(tmp_path / "stopped") == 3
    assert signal.getsignal(signal.SIGTERM) == before
    assert_same_bits(run(tmp_path / "stopped"), want)


@pytest.mark.slow
def test_a_window_of_steps_is_profiled(tmp_path):
    run(tmp_path, profile=(2, 3))
    assert list((tmp_path / profiling.FOLDER).rglob("*.xplane.pb"))


def test_dry_run_prints_config_mesh_and_parameters_without_the_devices(tmp_path):
    done = command(tmp_path, "--dry_run", "--config.optim.lr=0.5")
    assert done.returncode == 0, done.stderr
    assert "optim.lr = 0.5" in done.stdout
    assert "mesh {'dcn': 1, 'data': 1, 'fsdp': 64, 'tensor': 1, 'context': 1}" in done.stdout
    assert "text/layers/attn/q/kernel" in done.stdout
    lines = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines() if line)
    # AdamW keeps two numbers per parameter, and two copies of a step counter.
    parameters, optimizer = float(lines["parameters"]), float(lines["optimizer"])
    assert abs(optimizer - 2 * parameters) < 0.01
    assert float(lines["activations"]) > 0
    assert "memory of one device, GiB, with 64 rows of 16384 + 2048" in lines


@pytest.mark.parametrize(
    ("args", "message"),
    {
        "field": (
            ["--config.train.stpes=4", "--dry_run"],
            "unknown field config.train.stpes; did you mean config.train.steps",
        ),
        "rows": (
            ["--config.data.batch=8", "--dry_run"],
            "config.data.batch: 8 rows a step of 16384 slots cannot be split over {'dcn': 1,",
        ),
        "workdir": ([], "--workdir is not set; it is the folder that the run writes to"),
    }.values(),
    ids=["field", "rows", "workdir"],
)
def test_a_wrong_command_is_one_line(tmp_path, args, message):
    done = command(tmp_path, *args)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"train.py: {message}")


@pytest.mark.slow
def test_a_killed_program_continues_bit_for_bit(tmp_path):
    steps = 12
    assert start_program(tmp_path / "whole", steps=steps).wait() == 0
    for rows in (1, 4, 8):  # kill while something is being written or computed, at any of these
        program = start_program(tmp_path / "killed", steps=steps)
        while len(metrics.read_rows(tmp_path / "killed")) <= rows and program.poll() is None:
            time.sleep(0.01)
        program.send_signal(signal.SIGKILL)
        assert program.wait() == -signal.SIGKILL
    assert start_program(tmp_path / "killed", steps=steps).wait() == 0
    want, got = (checkpoint.load_params(tmp_path / name) for name in ("whole", "killed"))
    assert_same_bits(got, want)
    whole, killed = (metrics.read_rows(tmp_path / name) for name in ("whole", "killed"))
    assert [row["loss"] for row in killed] == [row["loss"] for row in whole]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    assert start_program(tmp_path / "one", steps=3).wait() == 0
    assert [program.wait() for program in start_two(tmp_path / "two", steps=3)] == [0, 0]
    one, two = (metrics.read_rows(tmp_path / name) for name in ("one", "two"))
    np.testing.assert_allclose(
        [row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-5
    )
    want, got = (checkpoint.load_params(tmp_path / name) for name in ("one", "two"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), got, want)


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(tmp_path):
    steps = 40
    programs = start_two(tmp_path, steps=steps)
    while len(metrics.read_rows(tmp_path)) <= 2 and programs[0].poll() is None:
        time.sleep(0.01)
    programs[1].send_signal(signal.SIGTERM)
    errors = [program.communicate()[1] for program in programs]
    assert [program.returncode for program in programs] == [preemption.EXIT_CODE] * 2, errors
    stopped = checkpoint.newest_step(tmp_path)
    assert 3 <= stopped < steps
    assert all(f"asked to stop; step {stopped} of {steps} is saved" in text for text in errors)
    assert start_program(tmp_path, steps=stopped + 2).wait() == 0
    assert [row["step"] for row in metrics.read_rows(tmp_path)] == list(range(1, stopped + 3))


@pytest.mark.slow
def test_two_processes_with_different_configs_do_not_start(tmp_path):
    programs = start_two(tmp_path, steps=2, seeds=(0, 1))
    errors = [program.communicate()[1].splitlines()[-1] for program in programs]
    assert [program.returncode for program in programs] == [1, 1]
    message = "train.py: the processes have different configs: seed=0 in process 0, 1 in process 1"
    assert all(line.startswith(message) for line in errors)
