"""Both formats are listed from their headers alone, with sums at the end."""

import argparse

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from convert import from_hf, inspect
from convert.hf.safetensors import Stored
from tests import hf_folder, small_models
from videonsa_jax.errors import UserError
from videonsa_jax.sharding.mesh import make_mesh
from videonsa_jax.sharding.mesh_config import MeshConfig
from videonsa_jax.training import checkpoint

CFG = small_models.config(heads=6, kv_heads=2)


def call(verb, *argv) -> None:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    assert verb.run(parser.parse_args([str(arg) for arg in argv])) == 0


def lines(capsys, path) -> list[list[str]]:
    """The cells of the table, its head left out."""
    capsys.readouterr()
    call(inspect, path)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["name", "shape", "dtype", "bytes"]
    return [[cell.strip() for cell in row.split("  ") if cell] for row in rows]


def test_a_folder_is_listed_with_its_files(tmp_path, capsys, monkeypatch):
    tensors = hf_folder.write(tmp_path / "hf", CFG, files=2, dtype="bfloat16")
    monkeypatch.delattr(Stored, "read")
    *rows, total = lines(capsys, tmp_path / "hf")
    assert {row[0] for row in rows} == tensors.keys()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted({row[4] for row in rows}) == files
    norm = next(row for row in rows if row[0] == "model.norm.weight")
    assert norm[1:4] == ["[72]", "bfloat16", "144"]
    numbers = sum(x.size for x in tensors.values())
    assert total == [
        f"total of {len(tensors)}",
        f"{numbers:,} numbers",
        "bfloat16",
        f"{2 * numbers:,}",
    ]
    assert len(lines(capsys, tmp_path / "hf" / files[1])) == len(tensors) // 2 + 1


def test_a_checkpoint_is_listed_with_shardings_and_chunks(tmp_path, capsys):
    hf_folder.write(tmp_path / "hf", CFG)
    call(from_hf, tmp_path / "hf", tmp_path / "weights")
    *rows, total = lines(capsys, tmp_path / "weights")
    up = next(row for row in rows if row[0] == "text/layers/mlp/up/kernel")
    assert up == [up[0], "[2, 72, 44]", "float32", "25,344", "-; [2, 72, 44]"]
    assert total[0] == f"total of {len(rows)}"

    sharding = NamedSharding(make_mesh(MeshConfig(fsdp=8)), PartitionSpec(None, "fsdp"))
    x = jax.device_put(np.zeros((3, 16), np.float32), sharding)
    checkpoint.save_params(tmp_path / "run" / "checkpoints", {"x": {"y": x}}, CFG)
    (row, _) = lines(capsys, tmp_path / "run")
    assert row == ["x/y", "[3, 16]", "float32", "192", "(-, fsdp); [3, 2]"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "none: no such file or folder"),
        (".", "no complete checkpoint"),
        ("x.bin", "x.bin is a pickle"),
        ("x.txt", "x.txt: not a valid safetensors file"),
    ],
)
def test_what_cannot_be_listed_is_named(tmp_path, name, message):
    for file in ("x.bin", "x.txt"):
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=message):
        call(inspect, tmp_path / name)
