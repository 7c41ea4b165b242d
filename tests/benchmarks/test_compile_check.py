"""The kernels compile for GPUs and TPUs that are not there; broken limits are seen.

The long tests use the environment that `make aot` makes, and skip where it cannot be made.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
AOT_PYTHON = ROOT / ".venv-aot" / "bin" / "python"
TOO_LARGE = """
import sys
from unittest import mock
from benchmarks import compile_check
from pallas_kernels import block_sizes

key = "window_attention", 2, 128
large = block_sizes.triton.TuningConfig(128, 128, num_warps=4, num_stages=2)
with mock.patch.dict(block_sizes.triton.DEFAULTS, {key: large}):
    sys.exit(compile_check.main())
"""


def run(python, *command):
    return subprocess.run(
        [python, *command],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def aot():
    """A Python that compiles for devices that are not there."""
    if not AOT_PYTHON.exists():
        pytest.skip("no .venv-aot: `make aot` could not install what compiles for other devices")
    return AOT_PYTHON


@pytest.mark.parametrize(("target", "lost"), [("h100", "jax-cuda13-plugin"), ("v5e", "libtpu")])
def test_without_the_packages_it_says_so_and_exits_with_3(tmp_path, target, lost):
    out = tmp_path / "report.json"
    done = run(
        sys.executable, "-m", "benchmarks.compile_check", f"--target={target}", f"--out={out}"
    )
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert f"cannot compile for {target} here: {lost}" in line
    assert not out.exists()


@pytest.mark.slow
def test_every_kernel_and_the_whole_model_keep_the_limits(aot, tmp_path):
    out = tmp_path / "report.json"
    done = run(
        aot,
        "-m",
        "benchmarks.compile_check",
        "--target=h100",
        "--tokens=1024",
        "--prefill=36864",  # at a few blocks their number is that of other things, heads for one
        "--train=36864",
        f"--out={out}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["ok"]
    rows = {row["name"]: row for row in report["kernels"]}
    attention = rows["nsa_attention/combined_attention_fwd"]
    assert attention["wgmma"] > 0
    assert attention["spill_bytes"] == 0
    assert 0 < attention["shared_bytes"] <= 227 * 1024
    assert attention["vmem_bytes"] is None
    gradient = rows["nsa_attention/window_attention_bwd_dkv"]
    assert gradient["phase"] == "backward"
    assert gradient["wgmma"] > 0
    prefill, train = report["programs"]
    assert {"combined_attention_fwd", "dense_attention_fwd"} <= set(prefill["kernels"])
    assert 15 * 2**30 < prefill["argument_bytes"] < prefill["total_bytes"]
    assert {"selected_attention_bwd_dkv", "interval_attention_bwd_dkv"} <= set(train["kernels"])
    assert (train["topology"], train["mesh"]["fsdp"], train["rows"]) == ("h100:8", 8, 32)
    assert train["output_bytes"] < 2**20  # the metrics: the new state takes the old one's place
    assert 12 * 2**30 < train["argument_bytes"] < train["total_bytes"] < 0.9 * 80e9
    assert train["score_arrays"] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e"])
def test_every_tpu_kernel_keeps_the_limits(aot, tmp_path, target):
    out = tmp_path / "report.json"
    options = (f"--target={target}", "--tokens=1024", "--prefill=0", "--train=0", f"--out={out}")
    done = run(aot, "-m", "benchmarks.compile_check", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(out.read_text())["kernels"]}
    for name, phase in {
        "nsa_attention/select_blocks": "forward",
        "nsa_attention/selected_attention_fwd": "forward",
        "nsa_attention/selected_attention_bwd": "backward",
        "window_attention/window_attention_bwd_dkv": "backward",
    }.items():
        assert rows[name]["phase"] == phase
        assert 0 < rows[name]["vmem_bytes"] < 64 * 2**20
        assert rows[name]["registers"] is None


@pytest.mark.slow
def test_spilled_registers_are_seen(aot, tmp_path):
    options = ("--target=h100", "--tokens=1024", "--prefill=0", "--train=0")
    options += (f"--out={tmp_path / 'x.json'}",)
    done = run(aot, "-c", TOO_LARGE, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [line for line in done.stdout.splitlines() if line.startswith("BROKEN")]
    assert any("window_attention_fwd" in line and "spills" in line for line in broken)
