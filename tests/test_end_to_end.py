"""From video files to answers through the programs themselves, with a kill on the way."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from examples import demo
from videonsa_jax.data import needle
from videonsa_jax.training import checkpoint, metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> pathlib.Path:
    """A folder with clips, their questions, one broken clip, and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    made = demo.Demo(folder, needle.NeedleConfig(), {"train": 12, "heldout": 4}, ())
    demo.write_clips(made)
    demo.train_tokenizer(made)
    clip = sorted((folder / "clips" / "videos").glob("train*.mp4"))[0]
    clip.write_bytes(clip.read_bytes()[:100])
    return folder


def start(program: str, dataset: pathlib.Path, *flags: str) -> subprocess.Popen:
    """`train.py` or `eval.py` as a user starts it, on one device."""
    command = [
        sys.executable,
        program,
        "--config=configs/demo.py",
        f"--config.data.source=({str(dataset / 'clips/train.json')!r},)",
        f"--config.data.tokenizer={dataset / 'tokenizer'}",
        f"--config.eval.tasks.needle={dataset / 'clips/heldout.json'}",
        "--config.data.max_bad_fraction=0.2",
        f"--config.train.steps={STEPS}",
        "--config.train.log_every=1",
        "--config.train.save_every=1",
        *flags,
    ]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"})


@pytest.mark.slow
def test_train_kill_continue_and_evaluate_on_real_videos(dataset, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start("train.py", dataset, f"--workdir={whole}").wait() == 0
    program = start("train.py", dataset, f"--workdir={killed}")
    while len(metrics.read_rows(killed)) < 3 and program.poll() is None:
        time.sleep(0.01)
    program.send_signal(signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL
    assert start("train.py", dataset, f"--workdir={killed}").wait() == 0
    jax.tree.map(
        np.testing.assert_array_equal,
        checkpoint.load_params(killed),
        checkpoint.load_params(whole),
    )
    bad = [json.loads(line) for line in (whole / "bad_samples.jsonl").read_text().splitlines()]
    assert {"train_000000.mp4" in json.dumps(row) for row in bad} == {True}

    out = tmp_path / "eval"
    flags = (f"--checkpoint={killed}", "--task=needle", f"--out={out}")
    assert start("eval.py", dataset, *flags).wait() == 0
    rows = [json.loads(line) for line in (out / "needle.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert json.loads((out / "needle_summary.json").read_text())["n"] == 4
