"""A report ranks strategies by what their programs take; it needs no devices."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import pytest

from videonsa_jax.aot import report
from videonsa_jax.aot.estimate import estimate, kinds_of_memory
from videonsa_jax.aot.hlo import Collective
from videonsa_jax.aot.programs import RowShape
from videonsa_jax.aot.topology import CHIPS
from videonsa_jax.config.parse import load_config, parse
from videonsa_jax.sharding.mesh import make_mesh

ROOT = pathlib.Path(__file__).resolve().parents[3]
AOT_PYTHON = ROOT / ".venv-aot" / "bin" / "python"
CHIP = CHIPS["h100"]
GATHER = Collective("all-gather", "fsdp", 28, 45 * 10**9)
KINDS = ("parameters", "optimizer", "batch", "gradients", "activations", "outputs", "temporaries")


def times(collectives=(GATHER,), executed=CHIP.flops, written=0):
    return estimate(CHIP, 0.75 * executed, executed, written, collectives)


def row(strategy, gibibytes, *, fits, times=None):
    sizes = dict.fromkeys(KINDS, 0) | {"temporaries": gibibytes * 2**30}
    return report.Row(
        strategy=strategy,
        mesh={"fsdp": 8},
        rows=8,
        bytes_per_device=sizes | {"total": gibibytes * 2**30},
        device_bytes=CHIP.memory_bytes,
        fits=fits,
        flops=1e15,
        collectives=[GATHER] if times else None,
        times=times,
        compile_s=1.0,
        problem=None if times else "too large",
    )


@pytest.mark.parametrize(
    ("change", "limit", "step"),
    [
        ({}, "compute", 1),
        ({"written": 3.35e12}, "memory", 2),
        ({"collectives": [GATHER] * 30}, "links", 3),
        ({"collectives": [Collective("all-reduce", "dcn", 1, 25 * 10**9)]}, "links", 4),
    ],
)
def test_the_slowest_part_is_the_limit(change, limit, step):
    got = times(**change)
    assert (got.limit, got.step_s) == (limit, pytest.approx(step))
    assert got.mfu == pytest.approx(0.75 / step)


def test_strategies_that_fit_come_first_then_those_that_lack_least(tmp_path):
    rows = [
        row("huge", 300, fits=False),
        row("slow", 40, fits=True, times=times([GATHER] * 30)),
        row("large", 90, fits=False),
        row("fast", 60, fits=True, times=times()),
    ]
    ranked = report.ranked(rows)
    assert [x.strategy for x in ranked] == ["fast", "slow", "large", "huge"]
    assert "+10.9 GiB" in report.describe(ranked).splitlines()[3]

    made = {"topology": "h100:8", "phase": "train", "vision_tokens": 512, "text_tokens": 64}
    report.write(made | {"rows": [x.as_dict() for x in ranked]}, ranked, tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert saved[0]["collectives"] == [
        {"kind": "all-gather", "axis": "fsdp", "count": 28, "bytes": 45 * 10**9}
    ]
    assert (saved[0]["limit"], saved[3]["limit"]) == ("compute", None)
    with (tmp_path / "report.csv").open() as file:
        table = list(csv.DictReader(file))
    assert table[1]["all-gather/fsdp_bytes"] == str(45 * 10**9)
    assert (tmp_path / "report.png").stat().st_size > 0


def test_memory_is_known_by_kind_before_anything_is_compiled():
    overrides = ("model.text.vocab_size=256", "mesh.fsdp=8", "optim.grad_accum_steps=2")
    cfg = parse(load_config("configs/videonsa_7b_sft.py:smoke"), overrides)
    shape = RowShape(rows=16, vision_tokens=64, text_tokens=32)
    mesh = make_mesh(cfg.mesh)
    kinds = kinds_of_memory(cfg, mesh, shape, "train")
    assert kinds.optimizer == pytest.approx(2 * kinds.parameters, rel=0.01)
    assert kinds.gradients == kinds.parameters
    vision, text = cfg.model.vision, cfg.model.text
    kept = vision.num_layers * 256 * vision.d_model + text.num_layers * 96 * text.d_model
    assert kinds.activations == 2 * kept  # bytes of bfloat16, of one row at a time
    prefill = kinds_of_memory(cfg, mesh, shape, "prefill")
    assert (prefill.parameters, prefill.optimizer) == (kinds.parameters // 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "fsdp"),
    [("h100:8", 4), ("v6e:4x4", 8)],  # on the torus, axes of 8 and 2 divide both dimensions
)
def test_strategies_of_a_small_model_are_compiled_for_what_is_not_there(tmp_path, topology, fsdp):
    if not AOT_PYTHON.exists():
        pytest.skip("no .venv-aot: `make aot` could not install what compiles for other devices")
    command = [
        "--config=configs/videonsa_7b_sft.py:smoke",
        f"--topology={topology}",
        f"--out={tmp_path}",
    ]
    command += ["--strategy=fsdp,fsdp_cp:context=2", "--vision_tokens=512", "--text_tokens=128"]
    done = subprocess.run(
        [AOT_PYTHON, "-m", "videonsa_jax.aot.report", *command],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {x["strategy"]: x for x in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert all(x["fits"] for x in rows.values())
    kinds = {x["kind"] for x in rows["fsdp"]["collectives"] if x["axis"] == "fsdp"}
    assert "all-gather" in kinds
    split = rows["fsdp_cp:context=2"]
    assert any("context" in x["axis"].split("+") for x in split["collectives"])
    assert split["mesh"]["fsdp"] == fsdp


def test_without_the_packages_it_says_so_and_exits_with_3(tmp_path):
    command = ["--config=configs/videonsa_7b_sft.py", "--topology=v5e:16x16", f"--out={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "videonsa_jax.aot.report", *command],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "report: cannot compile for v5e:16x16 here: libtpu not installed" in done.stderr
