"""Every parameter has one row, with the names and shapes of transformers."""

import jax
import numpy as np
import pytest

from convert.models import videonsa
from convert.models.qwen2_5_vl import rows as qwen2_5_vl
from convert.weights import names
from tests import hf_folder, small_models
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


def test_gates_have_the_released_names_and_layout():
    params = _params(CFG)
    tensors = hf_folder.to_torch(params, videonsa.rows(CFG))
    prefix = "model.layers.1.self_attn.g_proj_"
    d, outputs = CFG.text.d_model, 3 * CFG.text.num_heads
    shapes = {"1.weight": (d, d), "1.bias": (d,), "2.weight": (outputs, d), "2.bias": (outputs,)}
    for name, shape in shapes.items():
        assert tensors[prefix + name].shape == shape
    np.testing.assert_array_equal(
        tensors[prefix + "2.weight"], params["text/layers/gates/out/kernel"][1].T
    )


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
    state, prefixes = model.state_dict(), qwen2_5_vl.PREFIXES
    want = {names.canonical(name, prefixes): tuple(x.shape) for name, x in state.items()}
    if cfg.text.tie_embeddings:
        del want["lm_head.weight"]
    abstract = _paths(small_models.abstract_params(cfg)[1])
    got = {}
    for row in qwen2_5_vl.rows(cfg):
        shape = abstract[row.jax].shape[0 if row.layers is None else 1 :]
        tensor = row.op.to_torch(np.broadcast_to(np.float32(0), shape))  # no memory behind it
        got |= dict.fromkeys(row.names(), tensor.shape)
    assert got == want
