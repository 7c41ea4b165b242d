"""The training program: it goes on where it was killed, bit for bit, and says what is wrong."""

import dataclasses
import errno
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import train
from convert.__main__ import main as convert
from tests import hf_folder, synthetic, training_program
from videonsa_jax.errors import UserError
from videonsa_jax.training import checkpoint, metrics, preemption, profiling, workdir_lock

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


def run(workdir, *, data=None, **train_fields):
    cfg = synthetic.run_config(train=train_fields)
    return train.run(cfg, workdir, data=data or synthetic.Batches(), devices=jax.devices()[:1])


def command(tmp_path, *args) -> subprocess.CompletedProcess:
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    return subprocess.run(
        [sys.executable, "train.py", f"--config={config}", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=training_program.TIMEOUT,
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
        run(tmp_path, data=data, max_consecutive_nonfinite=3)
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


def test_a_run_starts_from_a_folder_of_hugging_face(tmp_path):
    """As from its conversion: gates that the folder lacks are drawn from the run's seed."""
    hf, weights = tmp_path / "hf", tmp_path / "weights"
    hf_folder.write(hf, synthetic.MODEL, files=2, dtype="bfloat16")
    cfg = synthetic.run_config(train={"steps": 1, "init_from": str(hf)}, seed=5)
    data = synthetic.Batches(bad_from=0)  # no update is made
    got = train.run(cfg, tmp_path / "run", data=data, devices=jax.devices()[:1]).params
    assert convert(["from-hf", str(hf), str(weights), "--seed=5"]) == 0
    want = jax.tree.map(lambda x: x.astype(np.float32), checkpoint.load_params(weights))
    assert_same_bits(got, want)


def test_a_folder_of_another_model_is_refused_in_one_line(tmp_path):
    other = dataclasses.replace(synthetic.MODEL.text, d_ff=64, rope_theta=5e5)
    hf_folder.write(tmp_path / "hf", dataclasses.replace(synthetic.MODEL, text=other))
    message = r"^model.text.d_ff is 320, 64 in .*/hf; model.text.rope_theta is 1000000.0, 500000.0"
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path / "run", init_from=str(tmp_path / "hf"))
    assert "\n" not in str(error.value)


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


def test_a_second_run_in_a_folder_ends_before_it_begins(tmp_path):
    with (
        workdir_lock.held(tmp_path),
        pytest.raises(UserError, match="is in use by a run on host"),
    ):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [workdir_lock.FILE]
    run(tmp_path, data=synthetic.Batches(bad_from=0))


def test_a_full_disk_is_one_line_with_the_step_to_go_on_from(tmp_path, monkeypatch):
    class Full(metrics.MetricWriter):
        def write(self, row):
            if row["step"] == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().write(row)

    monkeypatch.setattr(metrics, "MetricWriter", Full)
    with pytest.raises(UserError) as error:
        run(tmp_path)
    line = str(error.value)
    assert line.startswith(f"{tmp_path}: No space left on device (")
    assert line.endswith("step 2 is complete: the same command goes on from it")


@pytest.mark.slow
def test_a_window_of_steps_is_profiled(tmp_path):
    run(tmp_path, profile=(2, 3))
    assert list((tmp_path / profiling.FOLDER).rglob("*.xplane.pb"))


def test_dry_run_prints_config_mesh_and_parameters_without_the_devices(tmp_path):
    changes = "optim.lr=0.5", "sharding.heads=tensor", "mesh.tensor=2"
    done = command(tmp_path, "--dry_run", *(f"--config.{change}" for change in changes))
    assert done.returncode == 0, done.stderr
    assert "optim.lr = 0.5" in done.stdout
    assert "mesh {'dcn': 1, 'data': 1, 'fsdp': 64, 'tensor': 2, 'context': 1}" in done.stdout
    assert re.search(r"text/layers/attn/q/kernel .* \(-, fsdp, tensor, -\) ", done.stdout)
    assert re.search(r"text/layers/attn/k/kernel .* \(-, fsdp, -, -\) ", done.stdout)
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
        "axis": (
            ["--config.sharding.heads=tensr", "--dry_run"],
            "config.sharding: heads='tensr' names the mesh axis 'tensr', which does not exist; did",
        ),
        "rows": (
            ["--config.data.batch=8", "--dry_run"],
            "config.data.batch: 8 rows a step of 16384 slots cannot be split over {'dcn': 1,",
        ),
        "workdir": ([], "--workdir is not set; it is the folder that the run writes to"),
    }.values(),
    ids=["field", "axis", "rows", "workdir"],
)
def test_a_wrong_command_is_one_line(tmp_path, args, message):
    done = command(tmp_path, *args)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"train.py: {message}")


@pytest.mark.slow
def test_a_killed_program_continues_bit_for_bit(tmp_path):
    changes = {"train": {"steps": 12}}
    training_program.complete(tmp_path / "whole", changes)
    for rows in (2, 5, 9):  # kill while something is being written or computed, at any of these
        with training_program.start(tmp_path / "killed", changes) as (program,):
            training_program.await_rows(tmp_path / "killed", rows, program)
            program.send_signal(signal.SIGKILL)
            assert program.wait(training_program.TIMEOUT) == -signal.SIGKILL
    training_program.complete(tmp_path / "killed", changes)
    want, got = (checkpoint.load_params(tmp_path / name) for name in ("whole", "killed"))
    assert_same_bits(got, want)
    whole, killed = (metrics.read_rows(tmp_path / name) for name in ("whole", "killed"))
    assert [row["loss"] for row in killed] == [row["loss"] for row in whole]
