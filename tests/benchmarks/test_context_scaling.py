"""Devices that share a video receive what is written down, and no more."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks.context.programs import Case, Geometry
from benchmarks.context_scaling import PHASES, expected, rows_of
from pallas_kernels import NSASpec

ROOT = pathlib.Path(__file__).resolve().parents[2]
AOT_PYTHON = ROOT / ".venv-aot" / "bin" / "python"
TINY = Geometry(heads=4, kv_heads=2, width=16, spec=NSASpec(16, 3, window_size=20))
WIDE = Geometry(heads=4, kv_heads=2, width=16, spec=NSASpec(16, 3, window_size=150))
ROW = 2 * 2 * 16 * 4  # bytes of a key and a value
CASES = [  # mode, devices, devices that share the heads, geometry
    ("gather", 4, 1, TINY),
    ("ring", 4, 1, TINY),
    *(
        pytest.param(mode, *sizes, marks=pytest.mark.slow)
        for mode in ("gather", "ring")
        for sizes in ((1, 1, TINY), (2, 1, TINY), (8, 1, TINY), (4, 2, TINY), (4, 1, WIDE))
    ),
]
RING_MEMORY = """
import sys
from benchmarks.context.programs import Case, temporary_bytes
from videonsa_jax.aot.topology import parse_topology

for count in (4, 8):
    case = Case("ring", count, int(sys.argv[1]), dtype="bfloat16")
    print(temporary_bytes(case, parse_topology(f"h100:{count}"))["forward"])
"""


def run(python, *command, devices=1):
    done = subprocess.run(
        [python, *command],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("mode", "context", "tensor", "geometry"), CASES)
def test_a_device_receives_what_is_counted(mode, context, tensor, geometry):
    case = Case(mode, context, 64, tensor, geometry=geometry)
    rows = rows_of("weak", case)
    assert [row["phase"] for row in rows] == list(PHASES)
    for row in rows:
        want = {kind: sum(parts.values()) for kind, parts in expected(case, row["phase"]).items()}
        assert row["collectives"] == {kind: size for kind, size in want.items() if size}
        assert row["as_expected"]


def test_the_count_of_four_devices_by_hand():
    means, halo, keys = 3 * 4 * ROW, 19 * ROW, 3 * 64 * ROW
    gather, ring = (Case(mode, 4, 64, geometry=TINY) for mode in ("gather", "ring"))
    assert expected(gather, "forward") == {
        "all-gather": {"means": means, "keys": keys},
        "collective-permute": {"halo": halo},
    }
    assert expected(gather, "backward") == {
        "reduce-scatter": {"means": means, "keys": keys},
        "collective-permute": {"halo": halo},
    }
    assert expected(ring, "forward") == {
        "all-gather": {"means": means},
        "collective-permute": {"halo": halo, "keys": keys},
    }
    assert expected(ring, "backward") == {
        "reduce-scatter": {"means": means},
        "collective-permute": {"halo": halo, "keys": keys, "gradients": 4 * 64 * ROW},
    }


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_with_as_many_tokens_per_device_only_the_halo_stays(mode):
    """Twice the devices: twice the others to receive from, and the same window."""
    few, many = (expected(Case(mode, context, 64, geometry=TINY), "forward") for context in (5, 9))
    assert many["collective-permute"]["halo"] == few["collective-permute"]["halo"]
    for terms in few, many:
        terms["collective-permute"].pop("halo")
    for kind, parts in few.items():
        assert many[kind] == {name: 2 * size for name, size in parts.items()}


def test_with_as_many_tokens_in_all_a_device_never_receives_more_than_those():
    for context in (2, 4, 8, 16):
        terms = expected(Case("gather", context, 1024 // context, geometry=TINY), "forward")
        assert terms["all-gather"]["keys"] == 1024 * ROW * (context - 1) // context


def test_too_few_devices_are_one_line():
    with pytest.raises(ValueError, match="JAX_NUM_CPU_DEVICES=32"):
        rows_of("weak", Case("gather", 16, 64, tensor=2, geometry=TINY))


@pytest.mark.slow
def test_the_program_writes_a_report_and_a_figure(tmp_path):
    out = tmp_path / "report.json"
    sizes = ["--context=2", "--tensor=1", "--tokens_per_device=128", "--tokens=512"]
    printed = run(
        sys.executable, "-m", "benchmarks.context_scaling", *sizes, f"--out={out}", devices=2
    )
    report = json.loads(out.read_text())
    assert len(report["rows"]) == 8  # two modes, two phases, two series
    assert all(row["measured_bytes"] == row["expected_bytes"] > 0 for row in report["rows"])
    assert len(printed.splitlines()) == 9
    assert out.with_suffix(".png").stat().st_size > 0


@pytest.mark.slow
def test_a_longer_ring_takes_no_more_memory():
    """An H100 of 8 holds two parts of the keys as one of 4 does."""
    if not AOT_PYTHON.exists():
        pytest.skip("no .venv-aot: `make aot` could not install what compiles for other devices")
    tokens = 2048
    four, eight = map(int, run(AOT_PYTHON, "-c", RING_MEMORY, str(tokens)).split())
    assert eight - four < 2 * tokens * 4 * 128 * 2  # keys and values of one device
