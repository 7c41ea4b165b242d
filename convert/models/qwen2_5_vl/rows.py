"""The rows of stock Qwen2.5-VL, and how its names are spelled.

Checkpoints on the hub say `model.layers.0...` and `visual.blocks.0...`; state dicts of recent
`transformers` say `model.language_model.layers.0...` and `model.visual.blocks.0...`. The hub's
spelling is canonical.
"""

from collections.abc import Mapping

from convert.weights.table import KEEP, LINEAR, Row, linear, patch_conv, vector
from videonsa_jax.config.schema import ModelConfig, TextConfig, VisionConfig

PREFIXES = (("model.language_model.", "model."), ("model.visual.", "visual."))
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tied(cfg: ModelConfig) -> Mapping[str, str]:
    """{copy that a folder may hold: what it repeats}."""
    return {_HEAD: _EMBEDDING} if cfg.text.tie_embeddings else {}


def rows(cfg: ModelConfig) -> tuple[Row, ...]:
    """Every parameter of the stock model of these sizes."""
    return (*_text_rows(cfg.text), *_vision_rows(cfg.vision))


def _text_rows(cfg: TextConfig) -> tuple[Row, ...]:
    d, h, layers = (cfg.d_model,), cfg.head_dim, cfg.num_layers
    q, kv = (cfg.num_heads, h), (cfg.num_kv_heads, h)

    def row(torch, jax, op=KEEP):
        return Row("model.layers.{l}." + torch, "text/layers/" + jax, op, layers)

    heads = [("q", q), ("k", kv), ("v", kv)]
    head = [] if cfg.tie_embeddings else [Row(_HEAD, "text/head/kernel", LINEAR)]
    return (
        Row(_EMBEDDING, "text/embed/embedding"),
        Row("model.norm.weight", "text/norm/scale"),
        *head,
        row("input_layernorm.weight", "attn_norm/scale"),
        row("post_attention_layernorm.weight", "mlp_norm/scale"),
        *(row(f"self_attn.{x}_proj.weight", f"attn/{x}/kernel", linear(d, o)) for x, o in heads),
        *(row(f"self_attn.{x}_proj.bias", f"attn/{x}/bias", vector(o)) for x, o in heads),
        row("self_attn.o_proj.weight", "attn/o/kernel", linear(q, d)),
        *(row(f"mlp.{x}_proj.weight", f"mlp/{x}/kernel", LINEAR) for x in ("gate", "up", "down")),
    )


def _vision_rows(cfg: VisionConfig) -> tuple[Row, ...]:
    d, heads = (cfg.d_model,), (cfg.num_heads, cfg.d_model // cfg.num_heads)
    qkv = (3, *heads)
    patch = (cfg.in_channels, cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)

    def row(torch, jax, op=KEEP):
        return Row("visual.blocks.{l}." + torch, "vision/layers/" + jax, op, cfg.num_layers)

    mlp = ("gate", "up", "down")
    merger = [("0", "hidden"), ("2", "out")]
    return (
        Row("visual.patch_embed.proj.weight", "vision/patch/kernel", patch_conv(patch)),
        row("norm1.weight", "attn_norm/scale"),
        row("norm2.weight", "mlp_norm/scale"),
        row("attn.qkv.weight", "attn/qkv/kernel", linear(d, qkv)),
        row("attn.qkv.bias", "attn/qkv/bias", vector(qkv)),
        row("attn.proj.weight", "attn/o/kernel", linear(heads, d)),
        row("attn.proj.bias", "attn/o/bias"),
        *(row(f"mlp.{x}_proj.weight", f"mlp/{x}/kernel", LINEAR) for x in mlp),
        *(row(f"mlp.{x}_proj.bias", f"mlp/{x}/bias") for x in mlp),
        Row("visual.merger.ln_q.weight", "vision/merger/norm/scale"),
        *(
            Row(f"visual.merger.mlp.{i}.weight", f"vision/merger/{x}/kernel", LINEAR)
            for i, x in merger
        ),
        *(Row(f"visual.merger.mlp.{i}.bias", f"vision/merger/{x}/bias") for i, x in merger),
    )
