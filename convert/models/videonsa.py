"""VideoNSA as a model family: stock Qwen2.5-VL and the gates of native sparse attention."""

import functools
from collections.abc import Mapping
from typing import Any

from convert.models.family import Family
from convert.models.qwen2_5_vl import config as stock_config
from convert.models.qwen2_5_vl import rows as stock
from convert.weights.table import LINEAR, Row
from videonsa_jax.config.schema import ModelConfig
from videonsa_jax.model.model import VideoNSA

_ARCHITECTURE = "VideoNSAForConditionalGeneration"


def rows(cfg: ModelConfig) -> tuple[Row, ...]:
    """Every parameter of a VideoNSA model of these sizes."""
    return (*stock.rows(cfg), *_gate_rows(cfg.text.num_layers))


def read_config(config: Mapping[str, Any], attention: str | None = None) -> ModelConfig:
    """As for stock Qwen2.5-VL; the published weights were evaluated with `released`."""
    return stock_config.read(config, attention or "released")


def _gate_rows(layers: int) -> tuple[Row, ...]:
    """The four tensors that VideoNSA adds to each decoder layer."""
    torch, jax = "model.layers.{l}.self_attn.g_proj_", "text/layers/gates/"
    return (
        Row(torch + "1.weight", jax + "hidden/kernel", LINEAR, layers),
        Row(torch + "1.bias", jax + "hidden/bias", layers=layers),
        Row(torch + "2.weight", jax + "out/kernel", LINEAR, layers),
        Row(torch + "2.bias", jax + "out/bias", layers=layers),
    )


FAMILY = Family(
    name="videonsa",
    architecture=_ARCHITECTURE,
    model_type=stock_config.MODEL_TYPE,
    config_class=ModelConfig,
    model=VideoNSA,
    rows=rows,
    read_config=read_config,
    write_config=functools.partial(
        stock_config.write, architecture=_ARCHITECTURE, has_sparse_sizes=True
    ),
    prefixes=stock.PREFIXES,
    tied=stock.tied,
    free_fields=stock_config.FREE_FIELDS,
    transformers_class=stock_config.ARCHITECTURE,  # without the gates
)
