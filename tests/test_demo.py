"""The demo in miniature, as a user starts it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ["--train=16", "--heldout=8", "--config.train.steps=4", "--config.train.log_every=2"]


def demo(workdir: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", "examples.demo", f"--workdir={workdir}", *SMALL, *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[pathlib.Path, subprocess.CompletedProcess]:
    workdir = tmp_path_factory.mktemp("runs") / "demo"
    return workdir, demo(workdir)


@pytest.mark.slow
def test_demo_writes_report_and_pictures(finished):
    workdir, process = finished
    assert process.returncode == 0, process.stderr
    report = json.loads((workdir / "report.json").read_text())
    assert set(report) == {
        "nsa", "dense", "blind", "chance", "attended_fraction", "wall_s",
    }  # fmt: skip
    for name in ("nsa", "dense"):
        assert set(report[name]) == {"accuracy", "n", "loss_first", "loss_last"}
        assert report[name]["n"] == 8
        assert report[name]["loss_last"] < report[name]["loss_first"]
    assert report["chance"] == 0.25
    assert 0 < report["attended_fraction"] < 0.5
    assert {path.name for path in workdir.glob("*.png")} >= {
        "loss.png", "gates.png", "selection.png",
    }  # fmt: skip
    assert "sparse (VideoNSA)" in process.stdout
    assert "ETA" in process.stdout


@pytest.mark.slow
def test_same_command_again_keeps_what_is_done(finished):
    workdir, first = finished
    assert first.returncode == 0, first.stderr
    checkpoint = workdir / "nsa" / "checkpoints"
    before = {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*") if path.is_file()}
    report = json.loads((workdir / "report.json").read_text())
    again = demo(workdir)
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in checkpoint.rglob("*") if p.is_file()} == before
    repeated = json.loads((workdir / "report.json").read_text())
    assert repeated | {"wall_s": 0} == report | {"wall_s": 0}


@pytest.mark.slow
def test_another_kind_in_the_same_folder_is_one_clear_line(finished):
    workdir, _ = finished
    process = demo(workdir, "--kind=count")
    assert process.returncode == 1
    assert "written with other kind; use another folder" in process.stderr
    assert "Traceback" not in process.stderr
