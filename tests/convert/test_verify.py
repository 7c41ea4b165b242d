"""`python -m convert verify` passes what a conversion made and names whatever differs."""

import argparse
import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from convert import compare_logits, from_hf, to_hf, verify
from convert.models.qwen2_5_vl import config as stock_config
from convert.store import orbax_stream
from tests import hf_folder, small_models
from videonsa_jax.training import checkpoint

CFG = small_models.config(heads=7, kv_heads=1, tied=True)
UP, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


def call(verb, *argv) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args([str(arg) for arg in argv]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder of stock Qwen2.5-VL, its tensors, and its conversion."""
    folder = tmp_path_factory.mktemp("plain")
    tensors = hf_folder.write(folder / "hf", CFG)
    assert call(from_hf, folder / "hf", folder / "checkpoint") == 0
    return folder, tensors


def _changed(plain, tmp_path, tensors):
    """The folder with other tensors, beside the same checkpoint."""
    folder, _ = plain
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_bytes((folder / "hf" / "config.json").read_bytes())
    hf_folder.write_tensors(tmp_path / "hf", tensors, files=1)
    return tmp_path / "hf", folder / "checkpoint"


def _output(capsys, *argv) -> tuple[int, str]:
    capsys.readouterr()
    code = call(verify, *argv)
    return code, capsys.readouterr().out


def test_a_conversion_passes(plain, capsys):
    folder, tensors = plain
    code, out = _output(capsys, folder / "hf", folder / "checkpoint", "--no-logits")
    assert code == 0
    assert out.endswith("PASS\n")
    assert f"tensors: {len(tensors)} compared, 0 differ, largest difference 0" in out
    assert "gates were initialised" in out
    assert "--no-logits" in out


def test_gates_of_videonsa_are_compared(tmp_path, capsys):
    tensors = hf_folder.write(tmp_path / "hf", CFG, gates=True, files=3)
    assert call(from_hf, tmp_path / "hf", tmp_path / "checkpoint") == 0
    code, out = _output(capsys, tmp_path / "hf", tmp_path / "checkpoint", "--no-logits")
    assert code == 0
    assert f"tensors: {len(tensors)} compared" in out
    assert "initialised" not in out


def test_changed_numbers_are_named_the_largest_first(plain, tmp_path, capsys):
    tensors = {name: x.copy() for name, x in plain[1].items()}
    tensors[UP][3, 5] += 0.25
    tensors[EMBEDDING][:2] += 7
    code, out = _output(capsys, *_changed(plain, tmp_path, tensors), "--no-logits")
    assert code == 1
    assert out.endswith("FAIL\n")
    assert "2 differ, largest difference 7" in out
    rows = [line.split() for line in out.splitlines() if line.endswith(".weight")]
    size = tensors[UP].size
    assert [row[-1] for row in rows] == [EMBEDDING, UP]
    assert rows[1][:3] == ["0.25", "1", f"{size:,}"]


def test_drawn_gates_are_compared_with_those_of_a_folder_that_has_some(plain, tmp_path, capsys):
    hf_folder.write(tmp_path / "hf", CFG, gates=True)
    code, out = _output(capsys, tmp_path / "hf", plain[0] / "checkpoint", "--no-logits")
    assert code == 1
    assert f"{len(plain[1]) + 4 * CFG.text.num_layers} compared" in out
    assert "initialised" not in out


def test_a_number_that_became_nan_differs(plain, tmp_path, capsys):
    tensors = {name: x.copy() for name, x in plain[1].items()}
    tensors[UP][0, 0] = np.nan
    code, out = _output(capsys, *_changed(plain, tmp_path, tensors), "--no-logits")
    assert code == 1
    assert "largest difference inf" in out


def test_missing_unexpected_and_misshapen_tensors_are_named(plain, tmp_path, capsys):
    tensors = dict(plain[1])
    tensors["rotary.inv_freq"] = np.zeros(3, np.float32)
    tensors["visual.merger.ln_q.weight"] = np.zeros(5, np.float32)
    del tensors["model.norm.weight"]
    hf, folder = _changed(plain, tmp_path, tensors)
    code, out = _output(capsys, hf, folder)
    assert code == 1
    lines = out.splitlines()
    for title, name in (
        (f"missing in {hf}: 1", "  model.norm.weight"),
        (f"unexpected in {hf}: 1", "  rotary.inv_freq"),
        ("of another shape: 1", "  visual.merger.ln_q.weight is [5], expected [24]"),
    ):
        assert lines[lines.index(title) + 1] == name
    assert "logits: not compared, because the sides are not one model" in out
    code, out = _output(capsys, hf, folder, "--no-logits", "--allow-unexpected=rotary.*")
    assert "unexpected in" not in out


def test_a_repeated_tied_head_is_accepted_only_if_equal(plain, tmp_path, capsys):
    tensors = dict(plain[1])
    tensors["lm_head.weight"] = tensors[EMBEDDING].copy()
    hf, folder = _changed(plain, tmp_path, tensors)
    code, out = _output(capsys, hf, folder, "--no-logits")
    assert code == 0
    assert "lm_head.weight repeats model.embed_tokens.weight" in out
    tensors["lm_head.weight"][0, 0] += 1
    hf_folder.write_tensors(hf, tensors, files=1)
    code, out = _output(capsys, hf, folder, "--no-logits")
    assert code == 1
    assert f"unexpected in {hf}: 1\n  lm_head.weight" in out


def test_a_policy_of_dtypes_is_reported_and_passes(plain, tmp_path, capsys):
    folder, tensors = plain
    assert call(from_hf, folder / "hf", tmp_path / "half", "--dtype=bfloat16") == 0
    code, out = _output(capsys, folder / "hf", tmp_path / "half", "--no-logits")
    assert code == 0
    assert f"{len(tensors)} tensors are bfloat16, float32 in" in out


def _mixed(tmp_path, decoder: str, **config):
    """A folder whose tower is float32, and its checkpoint."""
    tensors = hf_folder.write(tmp_path / "hf", CFG)
    is_tower = {name: name.startswith("visual.") for name in tensors}
    mixed = {name: x if is_tower[name] else x.astype(decoder) for name, x in tensors.items()}
    hf_folder.write_tensors(tmp_path / "hf", mixed, files=1)
    _edit_config(tmp_path / "hf", **config)
    assert call(from_hf, tmp_path / "hf", tmp_path / "checkpoint") == 0
    return tmp_path / "hf", tmp_path / "checkpoint"


def _edit_config(folder, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: x for key, x in (config | fields).items() if x is not None}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("decoder", ["bfloat16", "float16"])
@pytest.mark.parametrize("names", [["torch_dtype"], ["dtype"], ["dtype", "torch_dtype"]])
def test_a_mixed_model_is_exported_with_the_dtype_that_holds_it(tmp_path, capsys, decoder, names):
    fields = dict.fromkeys(["dtype", "torch_dtype"]) | dict.fromkeys(names, decoder)
    vision = stock_config.write(CFG, dtype=decoder)["vision_config"]
    vision["torch_dtype"] = decoder  # transformers 4 loads the tower in this one
    _, folder = _mixed(tmp_path, decoder, vision_config=vision, **fields)
    assert call(to_hf, folder, tmp_path / "export") == 0
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    written = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
    assert written == dict.fromkeys(names, "float32")
    assert config["vision_config"]["torch_dtype"] == "float32"
    assert _output(capsys, tmp_path / "export", folder, "--no-logits")[0] == 0


@pytest.mark.parametrize(
    "config",
    [
        {"torch_dtype": "bfloat16"},
        {"dtype": "bfloat16", "torch_dtype": "float32"},
        {"torch_dtype": None},
    ],
    ids=["old name", "new name rules", "none"],
)
def test_rounding_by_transformers_fails(tmp_path, capsys, config):
    hf, folder = _mixed(tmp_path, "bfloat16", **config)
    code, out = _output(capsys, hf, folder, "--no-logits")
    assert code == 1
    count = sum(name.startswith("visual.") for name in hf_folder.read_tensors(hf))
    dtype = next(iter(config.values())) or "bfloat16"  # none: that of the first tensor by name
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"rounded: {count} tensors"))
    assert f"in {dtype};" in lines[at]
    assert lines[at + 1].startswith("  visual.")
    _edit_config(hf, dtype="float32")
    assert _output(capsys, hf, folder, "--no-logits")[0] == 0


@pytest.mark.torch
def test_rounding_is_what_transformers_does(tmp_path, capsys):
    pytest.importorskip("torch", reason="needs PyTorch (see the test extra)")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    hf, folder = _mixed(tmp_path, "bfloat16", torch_dtype="bfloat16")
    code, out = _output(capsys, hf, folder)
    assert code == 1
    assert float(re.search(r"largest difference (\S+) of the largest logit", out)[1]) > 1e-4
    assert call(to_hf, folder, tmp_path / "export") == 0
    code, out = _output(capsys, tmp_path / "export", folder)
    assert code == 0, out
    for name, dtype in (("hf", "bfloat16"), ("export", "float32")):
        model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            tmp_path / name, dtype="auto"
        )
        assert {str(x.dtype) for x in model.parameters()} == {f"torch.{dtype}"}


def test_a_different_config_fails(plain, tmp_path, capsys):
    hf, folder = _changed(plain, tmp_path, plain[1])
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    code, out = _output(capsys, hf, folder, "--no-logits")
    assert code == 1
    assert "text.rope_theta is 1000.0, 5.0 in" in out


def test_gates_of_a_run_have_no_place_in_a_stock_folder(plain, tmp_path, capsys):
    folder, _ = plain
    params = checkpoint.load_params(folder / "checkpoint")
    cfg = checkpoint.load_model_config(folder / "checkpoint")
    checkpoint.save_params(tmp_path, jax.tree.map(np.asarray, params), cfg)
    code, out = _output(capsys, folder / "hf", tmp_path, "--no-logits")
    assert code == 1
    assert f"missing in {folder / 'hf'}: {4 * CFG.text.num_layers}" in out


def test_without_pytorch_it_says_that_logits_were_not_compared(plain, capsys, monkeypatch):
    folder, _ = plain
    monkeypatch.setattr(compare_logits, "missing_packages", lambda: ["torch"])
    code, out = _output(capsys, folder / "hf", folder / "checkpoint")
    assert code == 0
    assert "logits: not compared, because torch cannot be imported" in out


def test_memory_does_not_hold_a_whole_parameter(plain, monkeypatch):
    folder, _ = plain
    largest = 0

    def read(self, indices, read=orbax_stream.StoredArray.read):
        nonlocal largest
        for index, block in read(self, indices):
            largest = max(largest, block.nbytes)
            yield index, block

    monkeypatch.setattr(orbax_stream.StoredArray, "read", read)
    monkeypatch.setattr("convert.weights.layout.BOX_BYTES", 8192)
    assert call(verify, folder / "hf", folder / "checkpoint", "--no-logits") == 0
    assert 4096 <= largest <= 8192


def test_agreement_measures_differences():
    rng = np.random.default_rng(0)
    theirs = rng.standard_normal((20, 50)).astype(np.float32)
    same = compare_logits.agreement(theirs, theirs)
    assert same.is_close
    assert (same.tokens, same.largest, same.divergence, same.top1) == (20, 0, 0, 1)
    ours = theirs.copy()
    ours[0, theirs[0].argmin()] = theirs[0].max() + 1
    other = compare_logits.agreement(theirs, ours)
    assert not other.is_close
    assert other.top1 == 0.95
    assert other.divergence > 0
    ours[0, 0] = np.nan
    assert not compare_logits.agreement(theirs, ours).is_close


@pytest.mark.torch
@pytest.mark.parametrize("gates", [False, True])
def test_logits_equal_those_of_transformers(plain, tmp_path, capsys, gates):
    pytest.importorskip("torch", reason="needs PyTorch (see the test extra)")
    pytest.importorskip("transformers", reason="needs transformers")
    folder, _ = plain
    if gates:
        folder = tmp_path
        cfg = dataclasses.replace(CFG, position_advance="spatial")
        hf_folder.write(folder / "hf", cfg, gates=True, dtype="bfloat16")
        assert call(from_hf, folder / "hf", folder / "checkpoint") == 0
    code, out = _output(capsys, folder / "hf", folder / "checkpoint")
    assert code == 0, out
    assert "29 text tokens" in out
    assert "top-1 agreement 100.0%" in out
    assert ("not 'all_axes'" in out) is not gates
