"""transformers -> from-hf -> to-hf -> transformers: the same names, bits and logits."""

import argparse
import dataclasses
import json
import pathlib

import numpy as np
import pytest

pytest.importorskip("torch", reason="the round trip needs PyTorch (see the test extra)")
pytest.importorskip("transformers", reason="the round trip needs transformers")

import torch
import transformers

from convert import from_hf, logits, to_hf
from convert.models.qwen2_5_vl import rows
from convert.weights import names
from tests import hf_folder, huggingface, small_models
from tests.small_models import IMAGE, VIDEO, Vision
from videonsa_jax.config.schema import PRESETS, ModelConfig
from videonsa_jax.training import checkpoint

pytestmark = pytest.mark.torch

RELATIVE = 1e-4  # of the largest logit
PROMPTS = [[5, Vision((3, 6, 10), seconds=1.5), 4], [9]]
HEADS = {"3b": (8, 1), "7b": (14, 2), "32b": (10, 2), "72b": (16, 2)}


def _small(size: str) -> ModelConfig:
    """A published geometry on a scale: its query heads per KV head, widths of MLP, tied or not."""
    published = PRESETS[f"qwen2_5_vl_{size}"]
    heads, kv_heads = HEADS[size]
    assert published.text.num_heads * kv_heads == published.text.num_kv_heads * heads
    cfg = small_models.config(
        heads=heads, kv_heads=kv_heads, tied=published.text.tie_embeddings, attention="paper"
    )
    text = _scaled(cfg.text, published.text)
    return dataclasses.replace(cfg, text=text, vision=_scaled(cfg.vision, published.vision))


def _scaled(small, published):
    return dataclasses.replace(small, d_ff=small.d_model * published.d_ff // published.d_model)


@dataclasses.dataclass(frozen=True)
class Case:
    size: str
    gates: bool
    state_dict_names: bool = False
    dtype: str = "float32"
    shard: str = "1GB"


CASES = {
    "3b": Case("3b", gates=False),
    "7b": Case("7b", gates=False, dtype="bfloat16", shard="60KB"),
    "32b": Case("32b", gates=False, state_dict_names=True),
    "72b": Case("72b", gates=False, state_dict_names=True, dtype="bfloat16"),
    "3b_gates": Case("3b", gates=True, state_dict_names=True, dtype="bfloat16"),
    "7b_gates": Case("7b", gates=True, shard="100KB"),
    "32b_gates": Case("32b", gates=True, dtype="bfloat16"),
    "72b_gates": Case("72b", gates=True, state_dict_names=True),
}


def call(verb, *argv) -> None:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    assert verb.run(parser.parse_args([str(arg) for arg in argv])) == 0


@dataclasses.dataclass(frozen=True)
class Trip:
    """The folders of a model's way: source, checkpoint, export."""

    case: Case
    cfg: ModelConfig
    folder: pathlib.Path


@pytest.fixture(params=CASES, scope="module")
def trip(request, tmp_path_factory):
    case = CASES[request.param]
    cfg, seed = _small(case.size), list(CASES).index(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model = huggingface.torch_model(cfg, seed).to(getattr(torch, case.dtype))
    model.save_pretrained(folder / "source")
    (folder / "source" / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    if case.gates:
        _add_gates(folder / "source", cfg, np.random.default_rng(seed))
    if case.state_dict_names:
        hf_folder.rename(folder / "source")
    call(from_hf, folder / "source", folder / "checkpoint")
    size = f"--max-shard-size={case.shard}"
    call(to_hf, folder / "checkpoint", folder / "export", size)
    return Trip(case, cfg, folder)


def _add_gates(folder, cfg, rng) -> None:
    """Makes a folder of stock Qwen2.5-VL one of VideoNSA."""
    tensors = hf_folder.read_tensors(folder)
    dtype = tensors["model.embed_tokens.weight"].dtype
    d, outputs = cfg.text.d_model, 3 * cfg.text.num_heads
    for layer in range(cfg.text.num_layers):
        for name, shape in (("1", (d, d)), ("2", (outputs, d))):
            prefix = f"model.layers.{layer}.self_attn.g_proj_{name}"
            tensors[prefix + ".weight"] = rng.standard_normal(shape).astype(dtype)
            tensors[prefix + ".bias"] = rng.standard_normal(shape[0]).astype(dtype)
    hf_folder.write_tensors(folder, tensors, files=1)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["VideoNSAForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config))


def test_names_and_bits_are_the_same(trip):
    source = hf_folder.read_tensors(trip.folder / "source")
    source = {names.canonical(name, rows.PREFIXES): value for name, value in source.items()}
    export = hf_folder.read_tensors(trip.folder / "export")
    assert export.keys() == source.keys()
    for name, value in source.items():
        assert export[name].dtype == value.dtype
        assert export[name].shape == value.shape
        assert export[name].tobytes() == value.tobytes(), name


def test_shards_keep_to_the_limit_and_the_index_names_them(trip):
    files = sorted((trip.folder / "export").glob("*.safetensors"))
    assert (len(files) > 1) is (trip.case.shard != "1GB")
    index = trip.folder / "export" / hf_folder.INDEX
    assert index.is_file() is (len(files) > 1)
    if len(files) > 1:
        weight_map = json.loads(index.read_text())["weight_map"]
        assert weight_map.keys() == hf_folder.read_tensors(trip.folder / "export").keys()
        assert set(weight_map.values()) == {file.name for file in files}


def test_config_and_tokenizer_are_carried(trip):
    source, export = trip.folder / "source", trip.folder / "export"
    assert (export / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    before, after = (json.loads((x / "config.json").read_text()) for x in (source, export))
    assert after["architectures"] == before["architectures"]
    assert ("text_config" in after) is trip.case.gates
    text = after["text_config"] if trip.case.gates else after
    assert text["max_position_embeddings"] == 512
    assert checkpoint.load_model_config(trip.folder / "checkpoint").attention == (
        "released" if trip.case.gates else "paper"
    )


def _logits(folder, arrays) -> np.ndarray:
    """By transformers."""
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(**huggingface.torch_inputs(arrays)).logits.numpy()


@pytest.mark.parametrize(
    "trip",
    ["3b", "7b_gates", *(pytest.param(x, marks=pytest.mark.slow) for x in ("7b", "32b", "72b"))],
    indirect=True,
)
def test_logits_are_the_same(trip, tmp_path):
    arrays = small_models.inputs(PROMPTS, trip.cfg, padding="left", seed=1)
    before, after = (_logits(trip.folder / name, arrays) for name in ("source", "export"))
    np.testing.assert_array_equal(after, before)
    np.savez(tmp_path / "in.npz", **arrays)
    out = tmp_path / "out.npz"
    call(logits, trip.folder / "checkpoint", tmp_path / "in.npz", out, "--attention=dense")
    with np.load(out) as file:
        ours = file["logits"]
    text = arrays["attention_mask"].astype(bool) & ~np.isin(arrays["input_ids"], [IMAGE, VIDEO])
    limit = RELATIVE * np.abs(after[text]).max()
    np.testing.assert_allclose(ours[text], after[text], rtol=0, atol=limit)
