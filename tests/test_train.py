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
from videonsa_jax import checkpoint, metrics
from videonsa_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(
        model="tiny",
        data=dict(source=("none.jsonl",), tokenizer="none"),
        train=dict(steps=4),
        mesh=dict(fsdp=64),
    ))
"""

RUN = """
import sys
from tests import synthetic
import train
from videonsa_jax.config import MeshConfig
from videonsa_jax.sharding.mesh import join_processes

workdir, steps, process, processes, port = sys.argv[1], *map(int, sys.argv[2:])
if processes > 1:
    join_processes(f"localhost:{port}", processes, process)
cfg = synthetic.run_config(
    train={"steps": steps, "save_every": 1}, mesh=MeshConfig(fsdp=processes)
)
train.run(cfg, workdir, data=synthetic.Batches(process=process, processes=processes))
"""


def run(workdir, *, data=None, **train_fields):
    cfg = synthetic.run_config(train=train_fields)
    return train.run(cfg, workdir, data=data or synthetic.Batches(), devices=jax.devices()[:1])


def start_program(workdir, *, steps, process=0, processes=1, port=0) -> subprocess.Popen:
    """The run of `RUN` in a process of its own, with one device."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, (workdir, steps, process, processes, port))],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)},
    )


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


def test_dry_run_prints_config_mesh_and_parameters_without_the_devices(tmp_path):
    done = command(tmp_path, "--dry_run", "--config.optim.lr=0.5")
    assert done.returncode == 0, done.stderr
    assert "optim.lr = 0.5" in done.stdout
    assert "mesh {'data': 1, 'fsdp': 64, 'tensor': 1, 'context': 1}" in done.stdout
    assert "text/layers/attn/q/kernel" in done.stdout
    assert "total" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    {
        "field": (
            ["--config.train.stpes=4", "--dry_run"],
            "unknown field config.train.stpes; did you mean config.train.steps",
        ),
        "workdir": ([], "--workdir is not set; it is the folder that the run writes to"),
    }.values(),
    ids=["field", "workdir"],
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
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    programs = [
        start_program(tmp_path / "two", steps=3, process=i, processes=2, port=port) for i in (0, 1)
    ]
    assert [program.wait() for program in programs] == [0, 0]
    one, two = (metrics.read_rows(tmp_path / name) for name in ("one", "two"))
    np.testing.assert_allclose(
        [row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-5
    )
    want, got = (checkpoint.load_params(tmp_path / name) for name in ("one", "two"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), got, want)
