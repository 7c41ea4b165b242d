"""An adapter of PEFT becomes the model that its base with the adapter merged is."""

import argparse
import json
import math
import re

import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from convert import from_hf, inspect, verify
from convert.__main__ import main
from convert.hf import peft_adapter
from convert.models import videonsa
from convert.store import manifest
from tests import hf_folder, small_models
from videonsa_jax.training import checkpoint

CFG = small_models.config(heads=6, kv_heads=2)
TIED = small_models.config(heads=7, kv_heads=1, tied=True)
CONFIG = {
    **{"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]},
    **{"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct", "bias": "none"},
    **{"lora_dropout": 0.05, "task_type": "CAUSAL_LM", "inference_mode": True, "use_dora": False},
    **{"init_lora_weights": True, "exclude_modules": "visual.*", "peft_version": "0.18.0"},
}
LAYERS = "base_model.model.model.language_model.layers."
Q, UP = "self_attn.q_proj", "mlp.up_proj"
HEAD = "lm_head.weight"


def call(verb, *argv) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args([str(arg) for arg in argv]))


def lora(ranks: dict[str, int], cfg=CFG, dtype="float32") -> dict[str, np.ndarray]:
    """Random halves for all layers, by the names that PEFT gives them."""
    rng = np.random.default_rng(3)
    width, outputs = cfg.text.d_model, {Q: cfg.text.d_model, UP: cfg.text.d_ff}
    found = {}
    for layer in range(cfg.text.num_layers):
        for module, rank in ranks.items():
            name = f"{LAYERS}{layer}.{module}.lora_"
            found[f"{name}A.weight"] = rng.standard_normal((rank, width)).astype(dtype)
            found[f"{name}B.weight"] = rng.standard_normal((outputs[module], rank)).astype(dtype)
    return found


def write(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def plain(base: np.ndarray, tensors, layer: int, module: str, scale: float) -> np.ndarray:
    """W + scale B A."""
    a, b = (tensors[f"{LAYERS}{layer}.{module}.lora_{half}.weight"] for half in "AB")
    change = scale * (b.astype(np.float64) @ a.astype(np.float64))
    return (base.astype(np.float64) + change).astype(base.dtype)


CASES = {  # config, ranks, scales
    "alpha": ({}, {Q: 4, UP: 4}, {Q: 6 / 4, UP: 6 / 4}),
    "rslora": ({"use_rslora": True}, {Q: 4, UP: 4}, {Q: 6 / math.sqrt(4), UP: 6 / math.sqrt(4)}),
    "patterns": (
        {"rank_pattern": {"up_proj": 2, "mlp.up_proj": 9}, "alpha_pattern": {r".*\.q_proj": 5}},
        {Q: 4, UP: 2},
        {Q: 5 / 4, UP: 6 / 2},
    ),
    "expression": ({"target_modules": r".*\.q_proj"}, {Q: 4}, {Q: 6 / 4}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_merged_into_its_base(tmp_path, monkeypatch, capsys, name, dtype):
    monkeypatch.setattr("convert.weights.layout.BOX_BYTES", 4000)  # tensors are cut
    monkeypatch.setattr(peft_adapter, "_ROWS", 10)
    config, ranks, scales = CASES[name]
    base = hf_folder.write(tmp_path / "base", CFG, gates=True, files=2, dtype=dtype)
    tensors = lora(ranks)
    adapter = write(tmp_path / "adapter", tensors, **config)
    argv = (adapter, tmp_path / "out", f"--base={tmp_path / 'base'}")
    assert call(from_hf, *argv) == 0
    count = CFG.text.num_layers * len(ranks)
    out = capsys.readouterr().out
    assert f"adapter is an adapter: {count} tensors of {tmp_path / 'base'} change" in out
    assert "stay as they are" not in out
    want = dict(base)
    for layer in range(CFG.text.num_layers):
        for module, scale in scales.items():
            key = f"model.layers.{layer}.{module}.weight"
            want[key] = plain(base[key], tensors, layer, module, scale)
            assert not np.array_equal(want[key], base[key])
    got = traverse_util.flatten_dict(checkpoint.load_params(tmp_path / "out"), sep="/")
    step = {"float32": 1e-6, "bfloat16": 2**-7}[dtype]  # one rounding
    for path, value in hf_folder.to_jax(want, videonsa.rows(CFG)).items():
        assert got[path].dtype == value.dtype
        ours, theirs = (np.asarray(x, np.float32) for x in (got[path], value))
        atol = 1e-6 * np.abs(theirs).max()  # of terms that cancel
        np.testing.assert_allclose(ours, theirs, rtol=step, atol=atol, err_msg=path)
    source = manifest.read(tmp_path / "out").source
    assert source["base"] == str(tmp_path / "base")
    assert call(verify, *argv, "--no-logits") == 0
    assert call(verify, tmp_path / "base", tmp_path / "out", "--no-logits") == 1


def test_the_base_that_the_adapter_names_is_used(tmp_path):
    hf_folder.write(tmp_path / "base", CFG)
    adapter = write(
        tmp_path / "adapter", lora({Q: 4, UP: 4}), base_model_name_or_path=str(tmp_path / "base")
    )
    assert call(from_hf, adapter, tmp_path / "out") == 0


def test_layers_without_lora_are_reported_and_kept(tmp_path, capsys):
    base = hf_folder.write(tmp_path / "base", CFG)
    tensors = {name: x for name, x in lora({Q: 4}).items() if name.startswith(f"{LAYERS}0.")}
    config = {"target_modules": ["q_proj"], "exclude_modules": None}
    adapter = write(tmp_path / "adapter", tensors, **config)
    merged = peft_adapter.open_hf(adapter, tmp_path / "base", report=print).tensors
    kept = f"model.layers.1.{Q}.weight"
    assert "1 others that adapter_config.json names have no LoRA" in capsys.readouterr().out
    np.testing.assert_array_equal(merged[kept].read(), base[kept])


def test_modules_that_are_saved_whole_replace_the_base(tmp_path):
    base = hf_folder.write(tmp_path / "base", CFG, dtype="bfloat16")
    head = np.random.default_rng(1).standard_normal(base[HEAD].shape, np.float32)
    tensors = lora({Q: 4, UP: 4}, dtype=ml_dtypes.bfloat16) | {f"base_model.model.{HEAD}": head}
    adapter = write(tmp_path / "adapter", tensors, modules_to_save=["lm_head"])
    merged = peft_adapter.open_hf(adapter, tmp_path / "base", report=print).tensors
    np.testing.assert_array_equal(
        merged[HEAD].read(slice(3, 9)), head[3:9].astype(ml_dtypes.bfloat16), strict=True
    )
    assert call(from_hf, adapter, tmp_path / "out", f"--base={tmp_path / 'base'}") == 0


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora=True is not supported; merge the adapter with PEFT"),
    "bias": ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
    "biased": ({"lora_bias": True}, "lora_bias=True"),
    "other type": ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; allowed: 'LORA'"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
    "unknown": ({"use_new_method": True}, "use_new_method=True"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base too"),
    "layers": ({"layer_replication": [[0, 2]]}, "layer_replication="),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices="),
    "rank": ({"r": 8}, r"has LoRA of shapes \(4, 72\) .*, expected \(8, inputs\)"),
    "no rank": ({"r": 0}, "r=0 must be a positive integer"),
    "alpha": ({"lora_alpha": "6"}, "lora_alpha='6' must be a positive number"),
    "expression": ({"alpha_pattern": {"(": 5}}, "alpha_pattern=.* regular expressions"),
    "pattern": ({"alpha_pattern": {"k_proj": 5}}, "alpha_pattern names 'k_proj', which matches no"),
    "other target": ({"target_modules": ["q_proj"]}, "up_proj has LoRA but is not in target_mod"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(tmp_path, capsys, name):
    hf_folder.write(tmp_path / "base", CFG)
    config, message = REFUSED[name]
    adapter = write(tmp_path / "adapter", lora({Q: 4, UP: 4}), **config)
    _fails(capsys, message, adapter, tmp_path / "out", f"--base={tmp_path / 'base'}")


def _fails(capsys, message, *argv, verb="from-hf"):
    capsys.readouterr()
    assert main([verb, *map(str, argv)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_tensors_that_do_not_fit_are_refused(tmp_path, capsys):
    tensors = lora({Q: 4, UP: 4})
    hf_folder.write(tmp_path / "base", CFG)
    hf_folder.write(tmp_path / "other", small_models.config(heads=4, kv_heads=2))
    hf_folder.write(tmp_path / "tied", TIED)
    first = f"{LAYERS}0.{Q}.lora_"
    head = {f"base_model.model.{HEAD}": np.zeros((97, TIED.text.d_model), np.float32)}
    embedding = "base_model.model.model.embed_tokens.weight"
    cases = [
        (
            "other",
            tensors,
            {},
            r"changes model\.layers\.0\S+ of shape \(.*72\), but .* has \(.*48\)",
        ),
        ("base", {k: x for k, x in tensors.items() if k != f"{first}A.weight"}, {}, "lora_A"),
        ("base", {f"{first}A.weight": tensors[f"{first}A.weight"].astype(np.int8)}, {}, "missing"),
        ("base", tensors | {"base_model.model.lm_head.bias": np.zeros(3)}, {}, "neither of LoRA"),
        ("tied", head, {"modules_to_save": ["lm_head"]}, "has none"),
        (
            "tied",
            {embedding: head[f"base_model.model.{HEAD}"]},
            {"modules_to_save": ["embed_tokens"]},
            "are tied",
        ),
        ("base", {}, {}, "holds no tensor"),
    ]
    for base, given, config, message in cases:
        adapter = write(tmp_path / "adapter", given, **config)
        _fails(capsys, message, adapter, tmp_path / "out", f"--base={tmp_path / base}")


def test_an_adapter_is_recognised_everywhere(tmp_path, capsys):
    hf_folder.write(tmp_path / "base", CFG)
    adapter = write(tmp_path / "adapter", lora({Q: 4, UP: 4}))
    without = "is a LoRA adapter of Qwen/Qwen2.5-VL-3B-Instruct, .* --base=HF_DIR"
    _fails(capsys, without, adapter, tmp_path / "out")
    assert call(from_hf, tmp_path / "base", tmp_path / "weights") == 0
    _fails(capsys, without, adapter, tmp_path / "weights", verb="verify")
    carried = f"--files={adapter}"
    _fails(capsys, "no config.json", tmp_path / "weights", tmp_path / "out", carried, verb="to-hf")
    (adapter / "config.json").write_text("{}")  # some tools leave one there
    _fails(capsys, without, adapter, tmp_path / "out")
    _fails(capsys, "is an adapter, not a whole", adapter, tmp_path / "out", f"--base={adapter}")
    _fails(capsys, "no adapter_config", tmp_path / "base", tmp_path / "out", "--base=x")
    what, lines = inspect.describe(adapter)
    assert (what, len(lines)) == ("file of the adapter", 8)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    _fails(capsys, "pickle", adapter, tmp_path / "out", f"--base={tmp_path / 'base'}")
    (adapter / "adapter_model.bin").unlink()
    _fails(
        capsys, "no adapter_model.safe", adapter, tmp_path / "out", f"--base={tmp_path / 'base'}"
    )
    (tmp_path / "base" / "adapter_config.json").write_text("{}")
    _fails(capsys, "holds both a whole model and adapter_conf", tmp_path / "base", tmp_path / "out")
