"""The rows of VideoNSA: stock Qwen2.5-VL and the gates of native sparse attention."""

from convert.models.qwen2_5_vl import rows as qwen2_5_vl
from convert.weights.table import LINEAR, Row
from videonsa_jax.config.schema import ModelConfig


def rows(cfg: ModelConfig) -> tuple[Row, ...]:
    """Every parameter of a VideoNSA model of these sizes."""
    return (*qwen2_5_vl.rows(cfg), *gate_rows(cfg.text.num_layers))


def gate_rows(layers: int) -> tuple[Row, ...]:
    """The four tensors that VideoNSA adds to each decoder layer."""
    torch, jax = "model.layers.{l}.self_attn.g_proj_", "text/layers/gates/"
    return (
        Row(torch + "1.weight", jax + "hidden/kernel", LINEAR, layers),
        Row(torch + "1.bias", jax + "hidden/bias", layers=layers),
        Row(torch + "2.weight", jax + "out/kernel", LINEAR, layers),
        Row(torch + "2.bias", jax + "out/bias", layers=layers),
    )
