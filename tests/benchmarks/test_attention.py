"""The benchmark runs on a CPU, and the parts that a GPU times are what they are called."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.inputs import INPUTS
from benchmarks.timing import external_python, programs, roofline

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKENS = 128


@pytest.mark.slow
def test_it_times_both_on_a_cpu(tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, "benchmarks/attention.py", "--tokens=128", "--rounds=2"]
    done = subprocess.run(
        [*command, f"--out={out}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {row["what"] for row in report["rows"]} == {"dense forward", "nsa forward"}
    assert out.with_suffix(".png").exists()


def test_a_peer_that_is_not_installed_is_named_and_skipped(monkeypatch, capsys):
    monkeypatch.setattr(external_python, "BASELINES", ("mdy666",))
    baselines = external_python.run(sys.executable, "128", seed=0)
    assert baselines["rows"] == []
    assert "No module named" in baselines["skipped"]["mdy666"]
    assert "mdy666: skipped" in capsys.readouterr().out


@pytest.fixture(scope="module")
def arrays():
    return tuple(jnp.asarray(x) for x in INPUTS["video"](TOKENS))


@pytest.fixture(scope="module")
def stages(arrays):
    return programs.stages(arrays, "xla")


def test_the_stages_add_up_to_sparse_attention(arrays, stages):
    results = {name: jax.jit(op)(*given) for name, (op, given) in stages.items()}
    branches = [
        results["compressed_attention"][0],
        results["selected_attention"],
        results["window_attention"],
    ]
    gates = arrays[3]
    total = sum(gates[..., i, None] * branch for i, branch in enumerate(branches))
    want = jax.jit(programs.nsa)(*arrays[:4])
    np.testing.assert_allclose(total, want, rtol=0, atol=1e-5)


def test_decoding_is_the_last_row_of_dense_attention():
    op, given = programs.decoding(TOKENS, 2, jnp.float32, "xla")["decode"]
    q, k, v, *_ = given
    assert q.shape[:2] == (2, 1)
    logits = jnp.einsum("bskgh,btkh->bkgst", q.reshape(2, 1, 4, 7, -1), k) * q.shape[-1] ** -0.5
    want = jnp.einsum("bkgst,btkh->bskgh", jax.nn.softmax(logits), v).reshape(q.shape)
    np.testing.assert_allclose(op(*given), want, rtol=0, atol=1e-5)


def test_useful_work_of_every_program_is_known(stages):
    names = {"dense", "dense triton", "nsa", "decode", "decode cudnn", *stages}
    flops = {name: roofline.useful_flops(name, TOKENS, 2.0) for name in names}
    assert flops["dense"] == 4 * 128 * 28 * TOKENS * (TOKENS + 1) / 2
    assert flops["select_blocks"] == flops["compressed_attention"] / 2
    branches = ("compressed_attention", "selected_attention", "window_attention")
    assert flops["nsa"] == sum(flops[name] for name in branches)
    assert flops["block_mean"] == 0


def test_the_slower_limit_makes_the_roof():
    roof = roofline.Roof(flops=100.0, bandwidth=10.0)
    assert roof.seconds(1000.0, 10) == 10.0
    assert roof.seconds(1000.0, 1000) == 100.0
    assert roofline.Roof(flops=100.0).seconds(1000.0, 10**9) == 10.0
