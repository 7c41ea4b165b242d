"""Conversions in processes of their own: the memory they take, and what a full disk does."""

import dataclasses
import shutil
import subprocess
import sys

import pytest

from benchmarks import conversion
from tests import hf_folder, small_models
from videonsa_jax.config.schema import PRESETS

MEBIBYTE = 2**20
# A few boxes of 64 MiB are read, transposed, encoded and written at a time, whatever the size.
BOXES = 400 * MEBIBYTE


def wide_config():
    """0.6 GB of bfloat16 in layers; the largest tensor is the embedding of 41 MB."""
    cfg = PRESETS["tiny"]
    text = dataclasses.replace(
        cfg.text,
        vocab_size=20_000,
        d_model=1024,
        d_ff=8192,
        num_layers=10,
        num_heads=8,
        num_kv_heads=2,
        head_dim=128,
        mrope_section=(16, 24, 24),
    )
    return dataclasses.replace(cfg, text=text)


@pytest.fixture
def large_folder(tmp_path):
    """Emptied at once: pytest would keep the folders of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_memory_does_not_grow_with_the_model(large_folder):
    cfg = wide_config()
    sizes = [spec.nbytes for spec in conversion.specs(cfg, gates=True)]
    assert max(sizes) < 42e6
    assert sum(sizes) > 610e6
    for verb, x in conversion.convert_both_ways(large_folder, cfg, gates=True).items():
        limit = x.baseline_bytes + 1.5 * max(sizes) + BOXES
        assert x.peak_bytes < limit, f"{verb}: {x.peak_bytes:,} bytes, limit {int(limit):,}"


@pytest.mark.parametrize("verb", ["from-hf", "to-hf"])
def test_a_full_disk_leaves_a_marked_folder_and_one_line(tmp_path, verb):
    cfg = small_models.config()
    hf_folder.write(tmp_path / "hf", cfg)
    source = "hf"
    if verb == "to-hf":
        run(tmp_path, "from-hf", "hf", "weights")
        source = "weights"
    before = hf_folder.digest(tmp_path / source)
    failed = run(tmp_path, verb, source, "out", limit=10)
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"python -m convert {verb}: {tmp_path}")
    assert "File too large" in line
    assert "out.incomplete" in line
    assert hf_folder.digest(tmp_path / source) == before
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.incomplete" / ".incomplete").exists()
    assert run(tmp_path, verb, source, "out").returncode == 0


def run(folder, *argv, limit="unlimited") -> subprocess.CompletedProcess:
    """`python -m convert` in a folder; no file may grow beyond `limit` KiB."""
    verb, *paths = argv
    command = [sys.executable, "-m", "convert", verb, *(str(folder / path) for path in paths)]
    return subprocess.run(
        ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *command],
        cwd=conversion.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
