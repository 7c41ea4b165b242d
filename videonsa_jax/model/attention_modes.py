"""What `model.attention` may be: each mode of attention is one entry here, and a file of its own.

To add one, also from outside of this package: ATTENTION["mine"] = AttentionMode(attend=...).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from videonsa_jax.config.schema import ModelConfig
from videonsa_jax.errors import UserError
from videonsa_jax.model import attention, context_parallel, nsa
from videonsa_jax.model.attention import Streams
from videonsa_jax.model.released import attention as released
from videonsa_jax.model.released.layout import plan


@dataclasses.dataclass(frozen=True)
class AttentionMode:
    """What a decoder layer computes between its projections.

    Attributes:
      attend: attention of both streams; the arguments of `attention.attend`.
      vision_pairs: (model config, n) -> query-key pairs that n vision tokens of one video need.
      needs_gates: whether `attend` gets the branch gates of the vision tokens, else None.
      attend_shard: `attend` of the part of a row that a device holds, with the arguments of
        `context_parallel.attend`; None: every device computes whole rows.
      splits_heads: whether devices may compute some of the heads each.
      layout: (order i32[b t], positions i32[b t 3], vision slots, model config) -> arrays [b ...]
        that all layers share, `AttentionMetadata.layout`.
      options: defaults of `model.attention_options`; `options_of` gives a run's.
    """

    attend: Callable[..., Streams]
    vision_pairs: Callable[[ModelConfig, int], float]
    needs_gates: bool = False
    attend_shard: Callable[..., Streams] | None = None
    splits_heads: bool = True
    layout: Callable[..., Any] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)


ATTENTION = {
    # Qwen2.5-VL: every token attends to everything before it.
    "dense": AttentionMode(
        attend=attention.attend,
        vision_pairs=lambda cfg, tokens: attention.causal_pairs(tokens),
        attend_shard=context_parallel.attend,
    ),
    # arXiv:2510.02295: vision attends sparsely to vision, by three gated branches.
    "paper": AttentionMode(
        attend=nsa.attend,
        vision_pairs=lambda cfg, tokens: nsa.sparse_pairs(cfg.nsa, tokens),
        needs_gates=True,
        attend_shard=context_parallel.attend,
    ),
    # The released code. Its heads read other KV heads than their own, and it joins the streams. Its
    # pairs are counted as the paper's.
    "released": AttentionMode(
        attend=released.attend,
        vision_pairs=lambda cfg, tokens: nsa.sparse_pairs(cfg.nsa, tokens),
        needs_gates=True,
        splits_heads=False,
        layout=plan,
    ),
}


def mode_of(cfg: ModelConfig) -> AttentionMode:
    """The entry that `cfg.attention` names.

    Raises:
      UserError: there is none, or it has no option of a name in `cfg.attention_options`.
    """
    if cfg.attention not in ATTENTION:
        raise UserError(
            f"config.model.attention={cfg.attention!r} must be one of {', '.join(ATTENTION)}"
        )
    mode = ATTENTION[cfg.attention]
    if unknown := sorted(dict(cfg.attention_options).keys() - mode.options.keys()):
        raise UserError(
            f"config.model.attention_options.{unknown[0]}: the options of model.attention="
            f"{cfg.attention!r} are {sorted(mode.options)}"
        )
    return mode


def options_of(cfg: ModelConfig) -> dict[str, Any]:
    """The options of `cfg.attention`: defaults, and over them those of the config."""
    return {**mode_of(cfg).options, **dict(cfg.attention_options)}
