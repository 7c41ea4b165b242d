"""The arithmetic that a model needs: what a device's speed is measured against (MFU).

Counted are matrix products and the query-key pairs that a query sees, twice per multiply-add. What
an implementation does besides (recomputation, masked pairs, scores that it makes twice) is not
needed, and not counted.
"""

import dataclasses

from videonsa_jax.config.schema import ModelConfig, TextConfig
from videonsa_jax.model.attention import causal_pairs
from videonsa_jax.model.attention_modes import mode_of

BACKWARD = 2  # a product has two gradients, each a product of the same size


@dataclasses.dataclass(frozen=True)
class RowFlops:
    """Of the forward pass over one row.

    Attributes:
      tower: the vision tower, its attention included.
      linear: projections, feed-forward layers and gates of the decoder.
      attention: query-key pairs of the decoder.
      head: the logits of the text tokens.
    """

    tower: float
    linear: float
    attention: float
    head: float

    @property
    def forward(self) -> float:
        return self.tower + self.linear + self.attention + self.head

    @property
    def training(self) -> float:
        """Forward and backward."""
        return (1 + BACKWARD) * self.forward


def row_flops(
    cfg: ModelConfig, *, vision_tokens: int, text_tokens: int, frame_patches: int
) -> RowFlops:
    """One video of `vision_tokens` tokens, then `text_tokens` of text.

    Args:
      cfg: the model. The released mode is counted as the paper's.
      vision_tokens: after merging.
      text_tokens: that attend to all before them.
      frame_patches: of one frame pair, which full-attention layers of the tower attend within.
    """
    text, layers = cfg.text, cfg.text.num_layers
    mode = mode_of(cfg)
    gates = _gate_weights(text) if mode.needs_gates else 0
    linear = _layer_weights(text) * (vision_tokens + text_tokens) + gates * vision_tokens
    pairs = causal_pairs(vision_tokens + text_tokens) - causal_pairs(vision_tokens)
    pairs += mode.vision_pairs(cfg, vision_tokens)
    return RowFlops(
        tower=_tower(cfg, vision_tokens * cfg.vision.merge_size**2, frame_patches),
        linear=2.0 * layers * linear,
        attention=4.0 * layers * pairs * text.num_heads * text.head_dim,
        head=2.0 * text_tokens * text.d_model * text.vocab_size,
    )


def _layer_weights(text: TextConfig) -> int:
    heads = 2 * text.num_heads + 2 * text.num_kv_heads  # queries and output, keys and values
    return text.d_model * (heads * text.head_dim + 3 * text.d_ff)


def _gate_weights(text: TextConfig) -> int:
    return text.d_model * (text.d_model + 3 * text.num_heads)


def _tower(cfg: ModelConfig, patches: int, frame_patches: int) -> float:
    vision = cfg.vision
    width, joined = vision.d_model, vision.d_model * vision.merge_size**2
    layer = width * (4 * width + 3 * vision.d_ff)
    per_patch = vision.patch_elements * width + vision.num_layers * layer
    merger = joined * (joined + cfg.text.d_model) / vision.merge_size**2
    full = len(vision.full_attention_layers)
    windows = vision.num_layers - full
    seen = full * frame_patches + windows * min(vision.window_patches, frame_patches)
    return patches * (2.0 * (per_patch + merger) + 4.0 * seen * width)
