"""The benchmark of training steps runs on a CPU."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_times_sparse_and_dense_steps(tmp_path):
    out = tmp_path / "report.json"
    sizes = ["--preset=tiny", "--vision=128", "--text=16", "--steps=2", "--dtype=float32"]
    done = subprocess.run(
        [sys.executable, "benchmarks/training.py", *sizes, f"--out={out}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["attention"] for row in rows] == ["paper", "dense"]
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert math.isfinite(row["loss"])
        assert row["mfu"] is None  # no peak of a CPU is known
        assert f"{row['attention']}: " in done.stdout
