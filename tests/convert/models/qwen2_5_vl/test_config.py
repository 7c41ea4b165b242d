"""Published and saved config.json files map to the right sizes and back; the rest is refused."""

import copy
import dataclasses

import pytest

from convert.models import registry, videonsa
from tests import small_models
from videonsa_jax.config.schema import PRESETS, NSAConfig
from videonsa_jax.errors import UserError


def read(config, attention=None):
    """By the family that the config names."""
    return registry.of_config(config).read_config(config, attention)


def write(cfg, *, architecture, dtype, carried=None):
    family = registry.FAMILIES[architecture]
    return family.write_config(cfg, dtype=dtype, carried=carried)


# As on the hub. The 32B was saved by transformers 4.49, which leaves defaults of the vision tower
# out; the others were written by hand and use the tower's older names.
FLAT_7B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
TEXT_FIELDS = (  # those that later versions save inside a `text_config`
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
    "hidden_act",
    "max_position_embeddings",
)


def _with(config: dict, vision: dict, **fields) -> dict:
    return {**config, **fields, "vision_config": {**config["vision_config"], **vision}}


PUBLISHED = {
    "qwen2_5_vl_3b": _with(
        FLAT_7B,
        {"out_hidden_size": 2048},
        hidden_size=2048,
        intermediate_size=11008,
        max_window_layers=70,
        num_attention_heads=16,
        num_hidden_layers=36,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        vocab_size=151936,
    ),
    "qwen2_5_vl_7b": FLAT_7B,
    "qwen2_5_vl_32b": {
        **FLAT_7B,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "max_window_layers": 64,
        "num_attention_heads": 40,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "transformers_version": "4.49.0",
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        "vision_config": {
            "hidden_size": 1280,
            "in_chans": 3,
            "intermediate_size": 3456,
            "model_type": "qwen2_5_vl",
            "out_hidden_size": 5120,
            "spatial_patch_size": 14,
            "tokens_per_second": 2,
            "torch_dtype": "bfloat16",
        },
    },
    "qwen2_5_vl_72b": _with(
        FLAT_7B,
        {"out_hidden_size": 8192, "intermediate_size": 3456},
        hidden_size=8192,
        intermediate_size=29568,
        max_window_layers=80,
        num_attention_heads=64,
        num_hidden_layers=80,
        num_key_value_heads=8,
    ),
}


def _nested(flat: dict, *, version: str, **text) -> dict:
    """As later versions save it: 4.52 to 4.57 repeat the text model's fields, 5 does not."""
    config = copy.deepcopy(flat)
    fields = {key: config.pop(key) for key in TEXT_FIELDS}
    rope, theta = config.pop("rope_scaling"), config.pop("rope_theta")
    if version.startswith("4"):
        config |= {**fields, "rope_scaling": rope, "rope_theta": theta}
        fields |= {"rope_scaling": rope, "rope_theta": theta}
    else:
        section = rope["mrope_section"]
        fields["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": theta,
            "mrope_section": section,
            "type": "mrope",
        }
        config["vision_config"]["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "axial"}
        fields["layer_types"] = ["full_attention"] * fields["num_hidden_layers"]
    fields |= {"model_type": "qwen2_5_vl_text", **text}
    return {**config, "text_config": fields, "transformers_version": version}


def _videonsa(cfg):
    return dataclasses.replace(cfg, attention="released")


SMALL = {
    "tied": small_models.config(tied=True),
    "group_7": small_models.config(heads=7, kv_heads=1),
    "group_8": small_models.config(heads=8, kv_heads=1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_presets(name):
    assert read(PUBLISHED[name]) == PRESETS[name]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("version", ["4.55.0", "5.23.0"])
def test_nested_configs_are_the_presets(name, version):
    config = _nested(PUBLISHED[name], version=version)
    advance = "spatial" if version.startswith("5") else "all_axes"
    want = dataclasses.replace(PRESETS[name], position_advance=advance)
    assert read(config) == want


def test_nested_sizes_that_are_left_out_are_the_class_defaults():
    config = _nested(PUBLISHED["qwen2_5_vl_72b"], version="4.55.0")
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        del config["text_config"][name]
    assert read(config) == PRESETS["qwen2_5_vl_72b"]


def test_videonsa_reads_its_sizes_from_the_text_config_only():
    name = "VideoNSAForConditionalGeneration"
    config = _nested(FLAT_7B, version="4.55.0") | {"architectures": [name], "window_size": 5}
    assert registry.of_config(config) is videonsa.FAMILY
    assert read(config) == _videonsa(PRESETS["qwen2_5_vl_7b"])
    assert read(config, attention="paper") == PRESETS["qwen2_5_vl_7b"]
    config["text_config"] |= {"block_counts": 16, "window_size": 512, "block_size": 32}
    want = NSAConfig(block_size=32, block_count=16, window_size=512)
    assert read(config).nsa == want


@pytest.mark.parametrize("cfg", [*PRESETS.values(), *SMALL.values()], ids=[*PRESETS, *SMALL])
@pytest.mark.parametrize("advance", ["all_axes", "spatial"])
@pytest.mark.parametrize("carried", [None, FLAT_7B, _nested(FLAT_7B, version="5.1.0")])
def test_round_trip(cfg, advance, carried):
    cfg = dataclasses.replace(cfg, position_advance=advance)
    for architecture, want in (
        ("videonsa", _videonsa(cfg)),
        ("qwen2_5_vl", dataclasses.replace(cfg, attention="paper", nsa=NSAConfig())),
    ):
        config = write(cfg, architecture=architecture, dtype="float32", carried=carried)
        assert registry.of_config(config).name == architecture
        assert read(config) == want


@pytest.mark.parametrize("carried", [FLAT_7B, _nested(FLAT_7B, version="4.55.0", pad_token_id=7)])
def test_carried_fields_are_kept_and_sizes_are_not(carried):
    carried = _with(carried, {"initializer_range": 0.5}, max_window_layers=3, use_cache=False)
    before = copy.deepcopy(carried)
    cfg = SMALL["group_7"]
    flat = write(cfg, architecture="qwen2_5_vl", dtype="float32", carried=carried)
    assert carried == before
    assert flat["max_window_layers"] == 3
    assert flat["vision_config"]["initializer_range"] == 0.5
    assert flat["hidden_size"] == cfg.text.d_model
    assert flat["torch_dtype"] == "float32"
    assert "text_config" not in flat
    nested = write(cfg, architecture="videonsa", dtype="float32", carried=carried)
    assert nested["text_config"]["max_position_embeddings"] == 128000
    assert "hidden_size" not in nested
    if "text_config" in carried:
        assert flat["pad_token_id"] == nested["text_config"]["pad_token_id"] == 7


TINY = {
    **{key: FLAT_7B[key] for key in ("architectures", "model_type", "transformers_version")},
    **{"hidden_size": 96, "intermediate_size": 44, "num_hidden_layers": 2, "vocab_size": 97},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6},
    "rope_theta": 5e5,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 4, 6]},
    "vision_config": {
        **{"hidden_size": 192, "num_heads": 3, "depth": 5, "out_hidden_size": 96},
        "fullatt_block_indexes": [1],
    },
}
TINY_READ = {
    **{"kv_heads": 2, "layers": 2, "theta": 5e5, "mrope_section": (2, 4, 6), "tied": False},
    **{"vision_heads": 3, "vision_layers": 5, "vision_theta": 1e4, "channels": 3, "eps": 1e-6},
    "image_token_id": 151655,
}


def _vision(*without: str, **others) -> dict:
    vision = {key: x for key, x in TINY["vision_config"].items() if key not in without}
    return {"vision_config": vision | others}


def _tiny_rope(scaling: dict | None, parameters: dict | None = None) -> dict:
    return {"rope_scaling": scaling, "rope_parameters": parameters}


def _tiny_nested(**text) -> dict:
    fields = {key: TINY[key] for key in (*TEXT_FIELDS, "rope_theta", "rope_scaling") if key in TINY}
    return {"text_config": {**fields, **text}, "hidden_size": 8, "rope_theta": 8.0}


VARIANTS = {  # spellings of one config, and what they change
    "as_it_is": ({}, {}),
    "vision_aliases": (
        _vision("num_heads", "depth", num_attention_heads=6, num_hidden_layers=8),
        {"vision_heads": 6, "vision_layers": 8},
    ),
    "both_names": (_vision(num_attention_heads=3, num_hidden_layers=5), {}),
    "vision_defaults": (
        _vision("num_heads", "depth"),
        {"vision_heads": 16, "vision_layers": 32},
    ),
    "default_type": (_tiny_rope({"rope_type": "default", "mrope_section": [2, 4, 6]}), {}),
    "both_types": (
        _tiny_rope({"rope_type": "mrope", "type": "default", "mrope_section": [4, 4, 4]}),
        {"mrope_section": (4, 4, 4)},
    ),
    "rope_parameters": (
        _tiny_rope(None, {"rope_type": "default", "mrope_section": [4, 4, 4], "rope_theta": 7.0}),
        {"mrope_section": (4, 4, 4), "theta": 7.0},
    ),
    "empty_rope_scaling": (
        _tiny_rope({}, {"rope_type": "mrope", "mrope_section": [4, 4, 4]}),
        {"mrope_section": (4, 4, 4)},
    ),
    "rope_scaling_wins": (
        _tiny_rope(TINY["rope_scaling"], {"rope_type": "default", "rope_theta": 7.0}), {}
    ),
    "theta_in_rope_scaling": (
        _tiny_rope({**TINY["rope_scaling"], "rope_theta": 7.0}), {"theta": 7.0}
    ),
    "vision_theta": (_vision(rope_theta=100.0), {"vision_theta": 100.0}),
    "vision_rope_scaling": (
        _vision(rope_theta=100.0, rope_scaling={"rope_type": "default", "rope_theta": 7.0}),
        {"vision_theta": 7.0},
    ),
    "vision_rope_parameters": (
        _vision(rope_parameters={"rope_type": "axial", "rope_theta": 7.0}), {"vision_theta": 7.0}
    ),
    "kv_heads_null": ({"num_key_value_heads": None}, {"kv_heads": 4}),
    "nested_eps": (_tiny_nested(rms_norm_eps=1e-4), {"eps": 1e-4}),
    "nested": (_tiny_nested(), {}),
    "nested_kv_heads_null": (_tiny_nested(num_key_value_heads=None), {"kv_heads": 4}),
    "nested_tied": (_tiny_nested(tie_word_embeddings=True), {"tied": True}),
    "nested_layer_types": (_tiny_nested(layer_types=["full_attention"] * 2), {}),
    "token_id": ({"image_token_id": 7}, {"image_token_id": 7}),
    "in_channels": (_vision(in_channels=1), {"channels": 1}),
    "in_chans": (_vision(in_channels=1, in_chans=1), {"channels": 1}),
    "sliding_window_unused": ({"use_sliding_window": False, "sliding_window": 4}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_every_spelling_is_read(name):
    change, changed = VARIANTS[name]
    cfg = read(TINY | change)
    text, vision = cfg.text, cfg.vision
    assert {
        "kv_heads": text.num_kv_heads,
        "layers": text.num_layers,
        "theta": text.rope_theta,
        "mrope_section": text.mrope_section,
        "tied": text.tie_embeddings,
        "eps": text.norm_eps,
        "vision_heads": vision.num_heads,
        "vision_layers": vision.num_layers,
        "vision_theta": vision.rope_theta,
        "channels": vision.in_channels,
        "image_token_id": cfg.image_token_id,
    } == TINY_READ | changed


@pytest.mark.torch
@pytest.mark.parametrize("name", VARIANTS)
def test_every_spelling_is_read_as_transformers_reads_it(name):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    change, changed = VARIANTS[name]
    cfg = transformers.Qwen2_5_VLConfig.from_dict(copy.deepcopy(TINY | change))
    text, vision = cfg.text_config, cfg.vision_config
    assert set(text.layer_types) == {"full_attention"}
    assert {
        "kv_heads": text.num_key_value_heads,
        "layers": text.num_hidden_layers,
        "theta": text.rope_parameters["rope_theta"],
        "mrope_section": tuple(text.rope_parameters["mrope_section"]),
        "tied": cfg.tie_word_embeddings,
        "eps": text.rms_norm_eps,
        "vision_heads": vision.num_heads,
        "vision_layers": vision.depth,
        "vision_theta": vision.rope_parameters["rope_theta"],
        "channels": vision.in_channels,
        "image_token_id": cfg.image_token_id,
    } == TINY_READ | changed


UNSUPPORTED = {
    "model_type": ({"model_type": "llama"}, "model_type='llama'.*'qwen2_5_vl'"),
    "class": ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "architectures=.*Qwen2VL"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
    "sliding_window": ({"use_sliding_window": True}, "use_sliding_window=True.*False"),
    "bias": ({"attention_bias": False}, "attention_bias=False.*True"),
    "causal": ({"is_causal": False}, "is_causal=False.*True"),
    "head_width": ({"head_dim": 64}, "head_dim=64.*128"),
    "vision_head_width": (_with(FLAT_7B, {"head_dim": 64}), r"vision_config\.head_dim=64.*80"),
    "vision_activation": (
        _with(FLAT_7B, {"hidden_act": "gelu"}),
        r"vision_config\.hidden_act='gelu",
    ),
    "layer": ({"per_layer_config": {"0": {"num_attention_heads": 4}}}, "per_layer_config="),
    "pruned": (_with(FLAT_7B, {"pruned_heads": {"0": [1]}}), r"vision_config\.pruned_heads="),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5.*1"),
    "partial_rope": (
        {"rope_scaling": {"type": "mrope", "partial_rotary_factor": 0.5}},
        r"rope_scaling\.partial_rotary_factor=0.5",
    ),
    "layers_rope": (
        {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
        r"rope_parameters\.full_attention=",
    ),
    "section": (
        {"rope_scaling": {"type": "mrope", "mrope_section": [8] * 4}},
        r"mrope_section=.*must be a list of 3 integers",
    ),
    "heads_alias": (
        _with(FLAT_7B, {"num_attention_heads": 8}),
        r"vision_config\.num_attention_heads=8 and vision_config\.num_heads=16 are two names",
    ),
    "depth_alias": (
        _with(FLAT_7B, {"num_hidden_layers": 8}),
        r"vision_config\.num_hidden_layers=8 and vision_config\.depth=32 are two names",
    ),
    "channels": (_with(FLAT_7B, {"in_chans": 1}), r"vision_config\.in_chans=1 .*allowed: 3"),
    "null": (_with(FLAT_7B, {"depth": None}), r"vision_config\.depth=None must be an integer"),
    "token": (
        _nested(FLAT_7B, version="4.55.0", image_token_id=7),
        r"text_config\.image_token_id=7 .*allowed: 151655",
    ),
    "rope_type": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}},
        r"rope_scaling\.type='yarn'.*'mrope' or 'default'",
    ),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config="),
    "text_type": ({"hidden_size": "3584"}, "hidden_size='3584' must be an integer"),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads=0 must be an integer, at least 1"),
    "heads": ({"num_key_value_heads": 3}, "num_kv_heads=3"),
    "merger": (_with(FLAT_7B, {"out_hidden_size": 2048}), r"vision_config\.out_hid.*=2048.*3584"),
    "vision": ({"vision_config": 3}, "vision_config=3 must be an object"),
}


@pytest.mark.parametrize(("change", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_values_are_named(change, message):
    with pytest.raises(UserError, match=message) as error:
        read(FLAT_7B | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["hidden_size", "num_key_value_heads", "model_type"])
def test_missing_fields_are_named(name):
    with pytest.raises(UserError, match=name):
        read({key: value for key, value in FLAT_7B.items() if key != name})


def test_sliding_layers_are_refused():
    config = _nested(FLAT_7B, version="5.23.0")
    config["text_config"]["layer_types"][3] = "sliding_attention"
    with pytest.raises(UserError, match=r"text_config\.layer_types='sliding_attention'"):
        read(config)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens_per_second": 2.5},
        {"text": dataclasses.replace(SMALL["tied"].text, d_model=60)},
        {"vision": dataclasses.replace(SMALL["tied"].vision, rope_theta=100.0)},
    ],
)
def test_models_without_a_config_json_are_refused(change):
    cfg = dataclasses.replace(SMALL["tied"], **change)
    with pytest.raises(UserError, match=r"has no config\.json"):
        write(cfg, architecture="videonsa", dtype="float32")


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "videonsa"])
@pytest.mark.parametrize("name", [*PRESETS, *SMALL])
def test_transformers_reads_what_is_written(name, architecture, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    cfg = {**PRESETS, **SMALL}[name]
    config = write(cfg, architecture=architecture, dtype="bfloat16", carried=FLAT_7B)
    theirs = transformers.Qwen2_5_VLConfig.from_dict(config)
    text, vision = theirs.text_config, theirs.vision_config
    got = {
        "width": (text.hidden_size, vision.hidden_size, vision.out_hidden_size),
        "heads": (text.num_attention_heads, text.num_key_value_heads, vision.num_heads),
        "layers": (text.num_hidden_layers, vision.depth),
        "rope": (text.rope_parameters["rope_theta"], text.rope_parameters["mrope_section"]),
        "rope_type": text.rope_parameters["rope_type"],
        "tied": theirs.tie_word_embeddings,
        "eps": text.rms_norm_eps,
        "tokens": (theirs.image_token_id, theirs.video_token_id, theirs.vision_start_token_id),
        "dtype": str(theirs.dtype),
    }
    assert got == {
        "width": (cfg.text.d_model, cfg.vision.d_model, cfg.text.d_model),
        "heads": (cfg.text.num_heads, cfg.text.num_kv_heads, cfg.vision.num_heads),
        "layers": (cfg.text.num_layers, cfg.vision.num_layers),
        "rope": (cfg.text.rope_theta, list(cfg.text.mrope_section)),
        "rope_type": "default",
        "tied": cfg.text.tie_embeddings,
        "eps": cfg.text.norm_eps,
        "tokens": (cfg.image_token_id, cfg.video_token_id, cfg.vision_start_token_id),
        "dtype": "torch.bfloat16",
    }
    theirs.save_pretrained(tmp_path)
    saved = read(transformers.PretrainedConfig.get_config_dict(str(tmp_path))[0])
    want = dataclasses.replace(cfg, position_advance="spatial", attention=saved.attention)
    assert saved == (
        want if architecture == "videonsa" else dataclasses.replace(want, nsa=saved.nsa)
    )
