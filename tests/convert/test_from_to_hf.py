"""Weights go to a checkpoint and back without losing a bit, in little memory."""

import argparse
import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from convert import from_hf, to_hf
from convert.models import videonsa
from convert.models.qwen2_5_vl import rows as stock
from convert.store import manifest, orbax_stream
from convert.weights import layout
from tests import hf_folder, small_models
from videonsa_jax.errors import UserError
from videonsa_jax.sharding.mesh import make_mesh
from videonsa_jax.sharding.mesh_config import MeshConfig
from videonsa_jax.training import checkpoint

CFG = small_models.config(heads=6, kv_heads=2)
TIED = small_models.config(heads=7, kv_heads=1, tied=True)
GATES = re.compile(r"text/layers/gates/")


def call(verb, *argv) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args([str(arg) for arg in argv]))


def refused(tmp_path, *argv, verb=from_hf, match):
    """The destination is absent afterwards, and the source as it was."""
    before = hf_folder.digest(tmp_path)
    with pytest.raises(UserError, match=match) as error:
        call(verb, *argv)
    assert "\n" not in str(error.value)
    assert hf_folder.digest(tmp_path) == before


def flat(params) -> dict[str, np.ndarray]:
    params = traverse_util.flatten_dict(params, sep="/")
    return {path: np.asarray(x) for path, x in params.items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name, strict=True)


@pytest.fixture(params=["one box", "many boxes"])
def box_bytes(request, monkeypatch):
    """Small models have no tensor that is cut unless boxes are small too."""
    if request.param == "many boxes":
        monkeypatch.setattr(layout, "BOX_BYTES", 4000)


@pytest.mark.usefixtures("box_bytes")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["untied", "tied"])
def test_round_trip_is_bit_identical(tmp_path, cfg, gates, dtype):
    tensors = hf_folder.write(tmp_path / "hf", cfg, gates=gates, files=2, dtype=dtype)
    source = hf_folder.digest(tmp_path / "hf")
    assert call(from_hf, tmp_path / "hf", tmp_path / "weights") == 0
    assert call(to_hf, tmp_path / "weights", tmp_path / "back") == 0
    assert_same(hf_folder.read_tensors(tmp_path / "back"), tensors)
    assert hf_folder.digest(tmp_path / "hf") == source
    assert sorted(file.name for file in (tmp_path / "back").iterdir()) == [
        "config.json", "manifest.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    there, back = (manifest.read(tmp_path / name) for name in ("weights", "back"))
    assert (there.architecture, there.gates) == (
        ("videonsa", "source") if gates else ("qwen2_5_vl", "initialised")
    )
    assert back.tensors == {name: there.tensors[name] for name in tensors}


@pytest.mark.usefixtures("box_bytes")
def test_the_checkpoint_is_an_ordinary_one(tmp_path):
    tensors = hf_folder.write(tmp_path / "hf", CFG, gates=True, dtype="bfloat16")
    call(from_hf, tmp_path / "hf", tmp_path / "weights")
    want = hf_folder.to_jax(tensors, videonsa.rows(CFG))
    assert_same(flat(checkpoint.load_params(tmp_path / "weights")), want)
    assert checkpoint.newest_step(tmp_path / "weights") == 0
    stored = checkpoint.load_model_config(tmp_path / "weights")
    assert stored == dataclasses.replace(stored, text=CFG.text, vision=CFG.vision, nsa=CFG.nsa)
    assert stored.attention == "released"
    assert (tmp_path / "weights" / "hf" / "tokenizer.json").exists()

    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))

    def abstract(path, x):
        split = [None] * x.ndim
        even = [axis for axis, size in enumerate(x.shape) if size % 8 == 0]
        if even:
            split[even[-1]] = ("fsdp", "tensor")
        sharding = NamedSharding(mesh, PartitionSpec(*split))
        return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=sharding)

    wanted = {path: abstract(path, x) for path, x in want.items()}
    params = checkpoint.load_params(
        tmp_path / "weights", traverse_util.unflatten_dict(wanted, sep="/")
    )
    assert_same(flat(params), {path: x.astype(np.float32) for path, x in want.items()})
    for path, x in traverse_util.flatten_dict(params, sep="/").items():
        assert x.sharding == wanted[path].sharding
    assert sum(not x.sharding.is_fully_replicated for x in wanted.values()) > 10


def test_large_parameters_are_stored_in_small_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "BOX_BYTES", 1000)
    hf_folder.write(tmp_path / "hf", CFG)
    call(from_hf, tmp_path / "hf", tmp_path / "weights")
    _, arrays = orbax_stream.stored_params(tmp_path / "weights")
    up = arrays["text/layers/mlp/up/kernel"]
    assert up.shape == (2, 72, 44)
    assert up.chunk == (1, 72, 2)
    assert max(4 * math.prod(x.chunk) for x in arrays.values()) <= 4 * 72 * 12  # a row of heads


def test_missing_gates_are_drawn_and_reported(tmp_path, capsys):
    hf_folder.write(tmp_path / "hf", CFG, dtype="bfloat16")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        call(from_hf, tmp_path / "hf", tmp_path / name, f"--seed={seed}")
    assert re.search(
        r"hf has no gates: 8 tensors are initialised, weights from N\(0, 0.02\) with seed 1, "
        "biases 0",
        capsys.readouterr().out,
    )
    a, b, c = (flat(checkpoint.load_params(tmp_path / name)) for name in "abc")
    assert_same(a, b)
    for path, value in a.items():
        assert value.dtype == ml_dtypes.bfloat16
        if GATES.match(path) and path.endswith("kernel"):
            assert not np.array_equal(value, c[path])
            assert not np.array_equal(value[0], value[1])
            assert 0.018 < value.astype(np.float32).std() < 0.022
        elif GATES.match(path):
            assert not value.any()
        else:
            np.testing.assert_array_equal(value, c[path])


def test_gates_leave_with_the_architecture_that_is_asked_for(tmp_path, capsys):
    hf_folder.write(tmp_path / "hf", CFG)
    call(from_hf, tmp_path / "hf", tmp_path / "weights")
    without, whole = (
        {name for row in rows for name in row.names()}
        for rows in (stock.rows(CFG), videonsa.rows(CFG))
    )
    cases = {"auto": without, "qwen2_5_vl": without, "videonsa": whole}
    for architecture, names in cases.items():
        out = tmp_path / architecture
        call(to_hf, tmp_path / "weights", out, f"--architecture={architecture}")
        assert hf_folder.read_tensors(out).keys() == names
        told = "the gates are left out" in capsys.readouterr().out
        assert told == (names == without)
        kind = json.loads((out / "config.json").read_text())["architectures"][0]
        assert kind.startswith("Qwen2_5_VL" if names == without else "VideoNSA")


def test_dtypes_are_kept_or_cast(tmp_path):
    tensors = hf_folder.write(tmp_path / "hf", CFG, dtype="bfloat16")
    call(from_hf, tmp_path / "hf", tmp_path / "wide", "--dtype=float32")
    wide = flat(checkpoint.load_params(tmp_path / "wide"))
    assert {x.dtype for x in wide.values()} == {np.dtype(np.float32)}
    call(to_hf, tmp_path / "wide", tmp_path / "back", "--dtype=bfloat16")
    assert_same(hf_folder.read_tensors(tmp_path / "back"), tensors)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    call(to_hf, tmp_path / "wide", tmp_path / "float32")
    want = {name: x.astype(np.float32) for name, x in tensors.items()}
    assert_same(hf_folder.read_tensors(tmp_path / "float32"), want)


def test_layers_of_two_dtypes_need_a_choice(tmp_path):
    tensors = hf_folder.write(tmp_path / "hf", CFG)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    hf_folder.write_tensors(tmp_path / "hf", tensors, files=1)
    match = rf"layers\.0.* is float32 and {re.escape(name)} is float16, .* --dtype=float32\|bfloat"
    refused(tmp_path, tmp_path / "hf", tmp_path / "weights", match=match)
    call(from_hf, tmp_path / "hf", tmp_path / "weights", "--dtype=bfloat16")


def test_a_trained_run_is_exported_from_its_newest_step(tmp_path, capsys):
    """Such checkpoints hold all layers in a chunk, and float32 parameters sharded over a mesh."""
    hf_folder.write(tmp_path / "hf", CFG)
    for step, seed in ((3, 1), (4, 2)):
        params = small_models.random_params(CFG, seed)
        mesh = make_mesh(MeshConfig(fsdp=8))
        sharded = jax.tree.map(
            lambda x, mesh=mesh: (
                jax.device_put(x, NamedSharding(mesh, PartitionSpec(*(None, "fsdp")[: x.ndim])))
                if x.ndim > 1 and x.shape[1] % 8 == 0
                else x
            ),
            params,
        )
        folder = tmp_path / "run" / checkpoint.FOLDER
        checkpoint.save_params(tmp_path / str(step), sharded, CFG)
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / str(step) / "0").rename(folder / str(step))
    want = hf_folder.to_torch(flat(params), videonsa.rows(CFG))
    for at, source in enumerate((tmp_path / "run", folder)):
        out = tmp_path / f"out{at}"
        call(to_hf, source, out, f"--files={tmp_path / 'hf'}", "--max-shard-size=100KB")
        assert_same(hf_folder.read_tensors(out), want)
        assert (out / "tokenizer.json").exists()
        assert manifest.read(out).source["step"] == 4
    capsys.readouterr()
    call(to_hf, folder, tmp_path / "bare")
    assert "no tokenizer and processor files are written" in capsys.readouterr().out


def test_files_are_split_as_on_the_hub(tmp_path):
    tensors = hf_folder.write(tmp_path / "hf", CFG)
    call(from_hf, tmp_path / "hf", tmp_path / "weights")
    call(to_hf, tmp_path / "weights", tmp_path / "out", "--max-shard-size=60KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files == to_hf.shard_names(len(files))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        inside = [tensors[name].nbytes for name, at in index["weight_map"].items() if at == file]
        assert sum(inside) <= 60_000 or len(inside) == 1
    assert_same(hf_folder.read_tensors(tmp_path / "out"), tensors)
    call(from_hf, tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize(
    ("text", "size"), {"5GB": 5e9, "1.5 kB": 1500, "2GiB": 2**31, "7": 7}.items()
)
def test_sizes_are_read(text, size):
    assert to_hf.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 parsecs", "5GBs"])
def test_other_sizes_are_refused(tmp_path, text):
    refused(
        tmp_path, "none", "out", f"--max-shard-size={text}", verb=to_hf, match="a size like 5GB"
    )


def test_names_are_matched_strictly(tmp_path, capsys):
    tensors = hf_folder.write(tmp_path / "hf", CFG)
    hf, out = tmp_path / "hf", tmp_path / "out"
    less = {name: x for name, x in tensors.items() if name != "model.norm.weight"}
    hf_folder.write_tensors(hf, less, files=1)
    refused(tmp_path, hf, out, match=r"1 tensors of .* are missing: model\.norm\.weight")
    hf_folder.write_tensors(hf, {**tensors, "rotary.inv_freq": np.zeros(3)}, files=1)
    refused(tmp_path, hf, out, match=r"1 tensors are not of .*: rotary\.inv_freq; .*-unexpected")
    refused(tmp_path, hf, out, "--allow-unexpected=inv", match=r"rotary\.inv_freq")
    refused(tmp_path, hf, out, "--allow-unexpected=(", match=r"--allow-unexpected=\(: ")
    call(from_hf, hf, out, r"--allow-unexpected=.*\.inv_freq")
    assert "1 unexpected tensors are left out: rotary.inv_freq" in capsys.readouterr().out


def test_gates_must_be_complete(tmp_path):
    tensors = hf_folder.write(tmp_path / "hf", CFG, gates=True)
    name = "model.layers.1.self_attn.g_proj_2.bias"
    del tensors[name]
    hf_folder.write_tensors(tmp_path / "hf", tensors, files=1)
    refused(tmp_path, tmp_path / "hf", tmp_path / "out", match=f"missing: {re.escape(name)}")


def test_a_model_of_another_size_is_refused(tmp_path):
    hf_folder.write(tmp_path / "hf", CFG)
    hf_folder.write(tmp_path / "other", small_models.config(heads=4, kv_heads=2))
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "hf" / "model.safetensors")
    match = r"model\.safetensors: tensor '.*' has shape \(.*\), expected \(.*\); .* another size"
    refused(tmp_path, tmp_path / "hf", tmp_path / "out", match=match)


def test_integers_are_no_weights(tmp_path):
    tensors = hf_folder.write(tmp_path / "hf", CFG)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    hf_folder.write_tensors(tmp_path / "hf", tensors, files=1)
    match = r"'model\.norm\.weight' has dtype int8, expected one of float32, bfloat16, float16"
    refused(tmp_path, tmp_path / "hf", tmp_path / "out", match=match)


def test_a_head_stored_with_a_tied_model_must_be_the_embedding(tmp_path, capsys):
    tensors = hf_folder.write(tmp_path / "hf", TIED)
    head = tensors["model.embed_tokens.weight"].copy()
    hf_folder.write_tensors(tmp_path / "hf", {**tensors, "lm_head.weight": head}, files=1)
    call(from_hf, tmp_path / "hf", tmp_path / "weights")
    assert "lm_head.weight is left out: it equals" in capsys.readouterr().out
    head[-1, -1] += 1
    hf_folder.write_tensors(tmp_path / "hf", {**tensors, "lm_head.weight": head}, files=1)
    match = r"lm_head\.weight differs from model\.embed_tokens\.weight, .* correct tie_word"
    refused(tmp_path, tmp_path / "hf", tmp_path / "out", match=match)


def test_destinations_are_never_overwritten(tmp_path):
    hf_folder.write(tmp_path / "hf", CFG)
    call(from_hf, tmp_path / "hf", tmp_path / "weights")
    match = "weights already exists; choose another destination"
    refused(tmp_path, tmp_path / "hf", tmp_path / "weights", match=match)
    refused(tmp_path, tmp_path / "weights", tmp_path / "weights", verb=to_hf, match=match)


def test_an_interrupted_conversion_starts_over(tmp_path, monkeypatch):
    tensors = hf_folder.write(tmp_path / "hf", CFG, gates=True)
    for verb, source, name in ((from_hf, "hf", "weights"), (to_hf, "weights", "back")):
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "write", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                call(verb, tmp_path / source, tmp_path / name)
        assert not (tmp_path / name).exists()
        assert (tmp_path / f"{name}.incomplete" / ".incomplete").exists()
        call(verb, tmp_path / source, tmp_path / name)
        assert not (tmp_path / f"{name}.incomplete").exists()
        assert not (tmp_path / name / ".incomplete").exists()
    assert_same(hf_folder.read_tensors(tmp_path / "back"), tensors)


def _interrupt(*_):
    raise KeyboardInterrupt


def test_no_checkpoint_is_no_source(tmp_path):
    refused(tmp_path, tmp_path / "none", tmp_path / "out", verb=to_hf, match="no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, tmp_path / "empty", tmp_path / "out", verb=to_hf, match="no complete")
