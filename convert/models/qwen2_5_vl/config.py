"""`config.json` of Qwen2.5-VL and VideoNSA, as transformers 4.49 to 5.x write it <-> `ModelConfig`.

The text model's fields stand at the top level, as on the hub, or in a `text_config`, as later
versions save them; a `text_config` rules over the top level, as it does in transformers.
"""

from collections.abc import Mapping
from typing import Any

from convert.hf.config import DTYPE_FIELDS, Section
from videonsa_jax.config.schema import (
    ModelConfig,
    NSAConfig,
    PositionAdvance,
    TextConfig,
    VisionConfig,
)
from videonsa_jax.errors import UserError

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
MODEL_TYPE = "qwen2_5_vl"
FREE_FIELDS = ("released.", "position_advance")  # of `ModelConfig`: not what the weights are

# Sections are saved as differences from their class's defaults, so these are what absence means.
_VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3_584,
    "intermediate_size": 3_420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 4,
    "out_hidden_size": 3_584,
    "rope_theta": 10_000.0,
}
_FLAT_DEFAULTS = {  # the top level is saved in full: sizes may not be absent there
    "model_type": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "mrope_section": [16, 24, 24],
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_start_token_id": 151_652,
}
_TEXT_DEFAULTS = {
    **_FLAT_DEFAULTS,
    "vocab_size": 152_064,
    "hidden_size": 8_192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
_VISION_ALIASES = {"num_attention_heads": "num_heads", "num_hidden_layers": "depth"}
_ROPE_FIELDS = ("rope_theta", "mrope_section")
# Fields of any section that would change what is computed, and the values that do not.
_FIXED = {
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "partial_rotary_factor": (None, 1),
}
_FIXED_TEXT = {
    "hidden_act": ("silu",),
    "attention_bias": (True, None),
    "is_causal": (True,),
    "use_sliding_window": (False, None),
}
# Of a `text_config`; elsewhere `window_size` is the vision tower's.
_NSA_SIZES = {
    "block_size": "block_size",
    "block_counts": "block_count",
    "window_size": "window_size",
}

# Fields that transformers wants and the model here does not; a carried config overrides them.
_TOP_BASE = {"vision_end_token_id": 151_653, "vision_token_id": 151_654}
_TEXT_BASE = {
    "attention_dropout": 0.0,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
    "initializer_range": 0.02,
    "max_position_embeddings": 128_000,
    "use_cache": True,
}
# Fields that `write` writes itself, or that repeat what it writes; never taken over.
_WRITTEN = {
    *_TEXT_DEFAULTS,
    *_VISION_DEFAULTS,
    *_NSA_SIZES,
    *_FIXED,
    *_FIXED_TEXT,
    *("architectures", "model_type", "text_config", "vision_config", "transformers_version"),
    *DTYPE_FIELDS,
    *("rope_scaling", "rope_parameters", "head_dim", "layer_types"),
    *("tie_word_embeddings", "in_chans", "spatial_patch_size"),
    "gate_temperature",
}


def read(config: Mapping[str, Any], attention: str | None = None) -> ModelConfig:
    """The model that a config.json describes.

    Args:
      config: parsed; not changed.
      attention: None is `paper`.

    Raises:
      UserError: a field is missing or has a value that this model does not support.
    """
    top = Section("", config, _FLAT_DEFAULTS)
    top.allow("model_type", MODEL_TYPE)
    nested = top.has("text_config")
    text = top.section("text_config", _TEXT_DEFAULTS) if nested else top
    vision = top.section("vision_config", _VISION_DEFAULTS).with_aliases(_VISION_ALIASES)
    for section in (top, text, vision):
        for key, values in _FIXED.items():
            section.allow(key, *values)
    try:
        return ModelConfig(
            text=_text(text, tied=_is_tied(top, text)),
            vision=_vision(vision, text.integer("hidden_size")),
            nsa=_nsa(text) if nested else NSAConfig(),
            attention=attention or "paper",
            **_token_ids(top, text),
            tokens_per_second=vision.number("tokens_per_second"),
            position_advance=_position_advance(config),
        )
    except UserError:
        raise
    except ValueError as error:  # a check of the dataclasses
        raise UserError(f"config.json: {error}") from error


def write(
    cfg: ModelConfig,
    *,
    dtype: str,
    carried: Mapping[str, Any] | None = None,
    architecture: str = ARCHITECTURE,
    has_sparse_sizes: bool = False,
) -> dict[str, Any]:
    """A config.json that transformers 4.49 to 5.x loads.

    Without the sizes of sparse attention it has the hub's flat layout, with them a `text_config`,
    where VideoNSA's code reads them. The attention mode and the switches of `released` have no
    field.

    Args:
      cfg: the model.
      dtype: that transformers is to load all tensors in, for example "bfloat16".
      carried: a config.json whose other fields are kept, for example the source's.
      architecture: the class to name.
      has_sparse_sizes: whether to write those.

    Raises:
      UserError: Hugging Face's code cannot compute such a model.
    """
    _refuse_without_form(cfg)
    carried = carried or {}
    top, text, vision = _extras(carried)
    text |= _text_fields(cfg.text)
    vision |= _vision_fields(cfg) | _dtype_fields(carried.get("vision_config"), dtype)
    if has_sparse_sizes:
        text |= {theirs: getattr(cfg.nsa, ours) for theirs, ours in _NSA_SIZES.items()}
        text |= {"gate_temperature": cfg.nsa.gate_temperature, "model_type": "qwen2_5_vl_text"}
        text |= _dtype_fields(carried.get("text_config"), dtype)
        layout = {"text_config": text}
    else:
        layout = text
    return {
        "architectures": [architecture],
        "model_type": MODEL_TYPE,
        **top,
        **layout,
        "vision_config": vision,
        "image_token_id": cfg.image_token_id,
        "video_token_id": cfg.video_token_id,
        "vision_start_token_id": cfg.vision_start_token_id,
        "tie_word_embeddings": cfg.text.tie_embeddings,
        **(_dtype_fields(carried, dtype) or {"torch_dtype": dtype}),
        "transformers_version": _version(cfg.position_advance, carried),
    }


def _text(text: Section, *, tied: bool) -> TextConfig:
    d_model, heads = text.integer("hidden_size"), text.integer("num_attention_heads")
    null_kv_heads = text.values.get("num_key_value_heads", ...) is None
    for key, values in _FIXED_TEXT.items():
        text.allow(key, *values)
    text.allow("head_dim", d_model // heads, None)
    for kind in text.values.get("layer_types") or ():
        Section(text.path, {"layer_types": kind}, {}).allow("layer_types", "full_attention")
    rope = _rope(text, ["mrope", "default"])
    return TextConfig(
        vocab_size=text.integer("vocab_size"),
        d_model=d_model,
        d_ff=text.integer("intermediate_size"),
        num_layers=text.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads if null_kv_heads else text.integer("num_key_value_heads"),
        head_dim=d_model // heads,
        mrope_section=rope.integers("mrope_section", count=3),
        rope_theta=rope.number("rope_theta"),
        norm_eps=text.number("rms_norm_eps"),
        tie_embeddings=tied,
    )


def _vision(vision: Section, text_width: int) -> VisionConfig:
    vision.allow("hidden_act", "silu")
    vision.allow("out_hidden_size", text_width)
    d_model, heads = vision.integer("hidden_size"), vision.integer("num_heads")
    channels = vision.integer("in_channels")
    vision.allow("in_chans", channels, None)  # a name that configs have and transformers ignores
    vision.allow("head_dim", d_model // heads, None)
    return VisionConfig(
        d_model=d_model,
        d_ff=vision.integer("intermediate_size"),
        num_layers=vision.integer("depth"),
        num_heads=heads,
        full_attention_layers=vision.integers("fullatt_block_indexes"),
        patch_size=vision.integer("patch_size"),
        temporal_patch_size=vision.integer("temporal_patch_size"),
        merge_size=vision.integer("spatial_merge_size"),
        window_pixels=vision.integer("window_size"),
        in_channels=channels,
        rope_theta=_rope(vision, ["axial", "default"]).number("rope_theta"),
    )


def _nsa(text: Section) -> NSAConfig:
    sizes = {ours: text.integer(theirs) for theirs, ours in _NSA_SIZES.items() if text.has(theirs)}
    if text.has("gate_temperature"):
        return NSAConfig(**sizes, gate_temperature=text.number("gate_temperature"))
    return NSAConfig(**sizes)


def _rope(section: Section, allowed: list[str]) -> Section:
    """Rotary fields: `rope_scaling`, or else `rope_parameters`, and the neighbour `rope_theta`."""
    defaults = {key: section.defaults[key] for key in _ROPE_FIELDS if key in section.defaults}
    defaults["rope_theta"] = section.number("rope_theta")
    keys = ("rope_scaling", "rope_parameters")
    key = next((key for key in keys if section.values.get(key)), None)  # empty is absent
    rope = Section(section.path, {}, defaults) if key is None else section.section(key, defaults)
    for kind in ("rope_type", "type"):
        rope.allow(kind, *allowed)
    rope.allow("partial_rotary_factor", *_FIXED["partial_rotary_factor"])
    for key, value in rope.values.items():
        if isinstance(value, Mapping):  # the fields of one kind of layers
            rope.allow(key, None)
    return rope


def _token_ids(top: Section, text: Section) -> dict[str, int]:
    """Those of the top level, which transformers reads; a `text_config` may repeat them."""
    keys = ("image_token_id", "video_token_id", "vision_start_token_id")
    ids = {key: top.integer(key, least=0) for key in keys}
    for key in filter(text.has, keys):
        text.allow(key, ids[key])
    return ids


def _is_tied(*levels: Section) -> bool:
    """Versions differ in the level that says so."""
    for level in levels:
        level.allow("tie_word_embeddings", True, False, None)
    return any(level.values.get("tie_word_embeddings") for level in levels)


def _position_advance(config: Mapping[str, Any]) -> PositionAdvance:
    """What the transformers that wrote the config computes."""
    major = str(config.get("transformers_version")).partition(".")[0]
    return "spatial" if major.isdigit() and int(major) >= 5 else "all_axes"


def _version(advance: PositionAdvance, carried: Mapping[str, Any]) -> str:
    """A `transformers_version` that `_position_advance` reads back, the carried one if it does."""
    if "transformers_version" in carried and _position_advance(carried) == advance:
        return carried["transformers_version"]
    return "5.0.0" if advance == "spatial" else "4.49.0"


def _refuse_without_form(cfg: ModelConfig) -> None:
    """Sizes that Hugging Face's code derives or fixes, with the values it needs."""
    text, vision = cfg.text, cfg.vision
    needs = {
        "text.head_dim": (text.head_dim, text.d_model / text.num_heads),
        "vision.rope_theta": (vision.rope_theta, _VISION_DEFAULTS["rope_theta"]),
        "vision.norm_eps": (vision.norm_eps, 1e-6),
        "tokens_per_second": (cfg.tokens_per_second, int(cfg.tokens_per_second)),
    }
    for name, (value, needed) in needs.items():
        if value != needed:
            raise UserError(
                f"model.{name}={value!r}: Hugging Face's Qwen2.5-VL computes only {needed!r}, "
                "so this model has no config.json"
            )


def _text_fields(text: TextConfig) -> dict[str, Any]:
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.d_model,
        "intermediate_size": text.d_ff,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": text.norm_eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
        "tie_word_embeddings": text.tie_embeddings,
        "use_sliding_window": False,
    }


def _vision_fields(cfg: ModelConfig) -> dict[str, Any]:
    vision = cfg.vision
    return {
        "depth": vision.num_layers,
        "hidden_size": vision.d_model,
        "hidden_act": "silu",
        "intermediate_size": vision.d_ff,
        "num_heads": vision.num_heads,
        "in_channels": vision.in_channels,
        "out_hidden_size": cfg.text.d_model,
        "patch_size": vision.patch_size,
        "spatial_patch_size": vision.patch_size,
        "spatial_merge_size": vision.merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "window_size": vision.window_pixels,
        "fullatt_block_indexes": list(vision.full_attention_layers),
        "tokens_per_second": int(cfg.tokens_per_second),
    }


def _dtype_fields(carried: Mapping[str, Any] | None, dtype: str) -> dict[str, str]:
    """The dtype under the names that a section has for it: transformers 5 renamed it."""
    return {key: dtype for key in DTYPE_FIELDS if key in (carried or {})}


def _extras(carried: Mapping[str, Any]) -> tuple[dict, dict, dict]:
    """What is kept of a carried config: of the top level, the text model, the vision tower."""

    def kept(section: str | None) -> dict[str, Any]:
        level = carried if section is None else carried.get(section) or {}
        return {key: value for key, value in level.items() if key not in _WRITTEN}

    top, text = kept(None), kept("text_config")
    flat = {key: top.pop(key) for key in _TEXT_BASE if key in top}
    return {**_TOP_BASE, **top}, {**_TEXT_BASE, **flat, **text}, kept("vision_config")
