"""Every parameter has one row, and rows lose nothing in either direction."""

import dataclasses

import jax
import numpy as np
import pytest

from convert.models import videonsa
from convert.models.qwen2_5_vl import rows as qwen2_5_vl
from convert.weights import names, table
from tests import small_models
from videonsa_jax.config.schema import PRESETS, ModelConfig

CFG = small_models.config(heads=6, kv_heads=2)


def _paths(params: dict) -> dict[str, np.ndarray]:
    leaves = jax.tree.leaves_with_path(params)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def _params(cfg: ModelConfig) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in _paths(small_models.random_params(cfg, 0)).items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_claim_every_parameter_once(preset):
    claimed = [row.jax for row in videonsa.rows(PRESETS[preset])]
    assert len(claimed) == len(set(claimed))
    assert set(claimed) == set(_paths(small_models.abstract_params(PRESETS[preset])[1]))


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_keeps_every_bit_and_shape(tied):
    cfg = dataclasses.replace(CFG, text=dataclasses.replace(CFG.text, tie_embeddings=tied))
    params, rows = _params(cfg), videonsa.rows(cfg)
    tensors = table.to_torch(params, rows)
    back = table.to_jax(tensors, rows)
    assert ("lm_head.weight" in tensors) is not tied
    assert back.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(back[path], value, err_msg=path, strict=True)


def test_gates_have_the_released_names_and_layout():
    params = _params(CFG)
    tensors = table.to_torch(params, videonsa.rows(CFG))
    prefix = "model.layers.1.self_attn.g_proj_"
    d, outputs = CFG.text.d_model, 3 * CFG.text.num_heads
    shapes = {"1.weight": (d, d), "1.bias": (d,), "2.weight": (outputs, d), "2.bias": (outputs,)}
    for name, shape in shapes.items():
        assert tensors[prefix + name].shape == shape
    np.testing.assert_array_equal(
        tensors[prefix + "2.weight"], params["text/layers/gates/out/kernel"][1].T
    )


def test_missing_and_unclaimed_names_are_reported():
    rows = videonsa.rows(CFG)
    tensors = table.to_torch(_params(CFG), rows)
    missing = {name: x for name, x in tensors.items() if name != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"1 tensors are missing: model\.norm\.weight"):
        table.to_jax(missing, rows)
    with pytest.raises(ValueError, match=r"1 tensors are claimed by no row: rotary\.inv_freq"):
        table.to_jax({**tensors, "rotary.inv_freq": np.zeros(2)}, rows)
    with pytest.raises(ValueError, match=r"8 tensors are claimed by no row: .*g_proj_1\.bias"):
        table.to_jax(tensors, qwen2_5_vl.rows(CFG))
    params = _params(CFG)
    del params["text/norm/scale"]
    with pytest.raises(ValueError, match="1 parameters are missing: text/norm/scale"):
        table.to_torch(params, rows)


@pytest.mark.parametrize(
    ("state_dict", "hub"),
    [
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.visual.blocks.0.attn.qkv.bias", "visual.blocks.0.attn.qkv.bias"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_both_spellings_are_one_name(state_dict, hub):
    assert names.canonical(state_dict) == names.canonical(hub) == hub
    assert names.module_path(hub) == state_dict
    if hub != state_dict:
        with pytest.raises(ValueError, match="two spellings"):
            names.canonical_names([hub, state_dict])


@pytest.mark.torch
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_rows_have_the_names_and_shapes_of_transformers(preset):
    torch = pytest.importorskip("torch", reason="needs PyTorch (see the test extra)")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from tests import huggingface

    cfg = PRESETS[preset]
    with torch.device("meta"):
        config = huggingface.torch_config(cfg)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    want = {names.canonical(name): tuple(p.shape) for name, p in model.state_dict().items()}
    if cfg.text.tie_embeddings:
        del want["lm_head.weight"]
    abstract = _paths(small_models.abstract_params(cfg)[1])
    got = {}
    for row in qwen2_5_vl.rows(cfg):
        shape = abstract[row.jax].shape[0 if row.layers is None else 1 :]
        tensor = row.op.to_torch(np.broadcast_to(np.float32(0), shape))  # no memory behind it
        got |= dict.fromkeys(row.names(), tensor.shape)
    assert got == want
