"""A sharding strategy changes where numbers are, not what they are."""

import functools

import jax
import pytest

from tests import synthetic
from tests.gradient_program import GradientProgram, assert_equal
from videonsa_jax.config.schema import ComputeConfig
from videonsa_jax.sharding import rules
from videonsa_jax.sharding.mesh_config import MeshConfig

LEAST = 20_000  # bytes of an exchange that is written down
# What a device receives in one step, by kind and mesh axes: how often, and bytes, at most.
EXCHANGES = {
    "dp": {("all-reduce", "data"): (6, 8_808_317)},
    "fsdp": {
        ("all-gather", "fsdp"): (63, 4_824_064),
        ("all-reduce", "fsdp"): (6, 7_890_813),
    },
    "hsdp": {
        ("all-gather", "fsdp"): (63, 4_134_720),
        ("all-reduce", "fsdp"): (5, 6_718_464),
        ("all-reduce", "dcn"): (5, 1_250_816),
        ("all-reduce", "dcn+fsdp"): (6, 52_605),
    },
    "tp": {
        ("all-reduce", "data"): (6, 4_006_362),
        ("all-reduce", "tensor"): (28, 1_579_648),
    },
    "fsdp_tp": {
        ("all-gather", "fsdp"): (69, 1_565_568),
        ("all-gather", "tensor"): (7, 154_032),
        ("all-reduce", "data"): (6, 1_175_552),
        ("all-reduce", "data+fsdp"): (6, 253_914),
        ("all-reduce", "fsdp"): (5, 2_088_960),
        ("all-reduce", "tensor"): (29, 1_579_648),
        ("collective-permute", "fsdp+tensor"): (3, 301_184),
    },
    "fsdp_cp": {
        ("all-gather", "fsdp+context"): (62, 4_823_616),
        ("all-reduce", "fsdp+context"): (5, 7_838_208),
        ("all-reduce", "fsdp"): (6, 45_090),
        ("all-reduce", "context"): (6, 30_060),
        ("all-gather", "context"): (15, 51_584),
        ("reduce-scatter", "context"): (12, 51_200),
        ("collective-permute", "context"): (28, 638_976),
    },
    "fsdp_tp_cp": {
        ("all-gather", "fsdp+context"): (69, 2_623_104),
        ("all-reduce", "fsdp+context"): (5, 3_585_024),
        ("all-reduce", "tensor"): (28, 1_579_648),
        ("collective-permute", "context"): (60, 897_024),
    },
}


@functools.cache
def program(preset: str, mesh: MeshConfig, devices: int = 8) -> GradientProgram:
    mode = "ring" if preset == "fsdp_tp_cp" else "gather"
    cfg = synthetic.run_config(
        mesh=mesh,
        sharding=rules.PRESETS[preset],
        compute=ComputeConfig(dtype="float32", remat="none", cp_mode=mode),
    )
    return GradientProgram(cfg, synthetic.batch(0), devices=jax.devices()[:devices])


@pytest.mark.parametrize(
    "preset",
    [
        # Every preset with `make test-slow`; always the one that splits all there is.
        name if name == "fsdp_tp_cp" else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(rules.PRESETS)
    ],
)
def test_loss_and_gradients_equal_those_of_one_device(preset):
    assert_equal(program(preset, synthetic.MESHES[preset]), program("dp", MeshConfig(), 1))


@pytest.mark.parametrize("preset", sorted(rules.PRESETS))
def test_devices_exchange_what_is_written_down_and_no_more(preset):
    """Parameters are gathered by layers, keys as context parallelism says, and nothing else."""
    exchanges = program(preset, synthetic.MESHES[preset]).exchanges()
    for found in exchanges:
        count, size = EXCHANGES[preset].get((found.kind, found.axis), (found.count, LEAST))
        assert found.count <= count, found
        assert found.bytes <= size, found
    received = {(found.kind, found.axis): found.bytes for found in exchanges}
    for kind, (_, size) in EXCHANGES[preset].items():
        assert received.get(kind, 0) >= size / 2, kind  # or something else does its work


def test_no_device_holds_whole_rows():
    """Two rows a device, shared by two: half of the pixels, the embedded text and the logits."""
    rows, slots, patches = 2, synthetic.BUCKET.text_tokens, 4 * synthetic.BUCKET.vision_tokens
    elements = synthetic.MODEL.vision.patch_elements
    vocabulary, width = synthetic.MODEL.text.vocab_size, synthetic.MODEL.text.d_model
    found = program("fsdp_cp", synthetic.MESHES["fsdp_cp"]).text.in_memory()
    assert f"f32[{rows},{patches // 2},{elements}]" in found
    assert f"f32[{rows},1,{slots // 2},{vocabulary}]" in found
    whole = {f"f32[{n},{patches},{elements}]" for n in (rows, synthetic.ROWS)}
    whole |= {f"f32[{n * patches},{elements}]" for n in (rows, synthetic.ROWS)}
    whole |= {f"f32[{n},{slots},{vocabulary}]" for n in (rows, synthetic.ROWS)}
    whole |= {f"f32[{rows * slots},{vocabulary}]", f"f32[{synthetic.ROWS},{slots},{width}]"}
    assert not whole & found
