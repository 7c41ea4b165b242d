"""AdamW with warm-up and cosine, clipping, frozen groups, and a learning rate for the gates.

Parameters are handled as a flat dict from "/"-joined path to array. Frozen ones never enter it, so
they have neither gradients nor optimizer state.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import optax
from flax import traverse_util

from videonsa_jax.config.schema import OptimConfig

GROUPS = {  # each parameter belongs to exactly one
    "gates": r"text/layers/gates/",
    "adapters": r"text/.*/lora_(in|out)$",
    "decoder": r"text/(?!layers/gates/)(?!.*/lora_(in|out)$)",
    "merger": r"vision/merger/",
    "vision": r"vision/(?!merger/)",
}
DECAYED = {  # by last name
    "kernel": True,
    "embedding": True,
    "lora_in": True,
    "lora_out": True,
    "bias": False,
    "scale": False,
}


def is_adapter(path: str) -> bool:
    """Whether a parameter is half of an adapter, which published weights do not have."""
    return re.match(GROUPS["adapters"], path) is not None


def group_of(path: str) -> str:
    """The group of a parameter.

    Raises:
      ValueError: none or several patterns of `GROUPS` match.
    """
    groups = [group for group, pattern in GROUPS.items() if re.match(pattern, path)]
    if len(groups) != 1:
        raise ValueError(f"parameter {path!r} is in {groups or 'no group'}, must be in one group")
    return groups[0]


def is_decayed(path: str) -> bool:
    """Whether weight decay applies: to matrices and embeddings.

    Raises:
      ValueError: the last name is not one of `DECAYED`.
    """
    name = path.rpartition("/")[2]
    if name not in DECAYED:
        raise ValueError(f"parameter {path!r}: its last name must be one of {sorted(DECAYED)}")
    return DECAYED[name]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update rule of a run of `steps` steps; holds no arrays."""

    cfg: OptimConfig
    steps: int

    def split(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Nested parameters -> (trained, frozen), both flat."""
        flat = traverse_util.flatten_dict(params, sep="/")
        frozen = {path: x for path, x in flat.items() if group_of(path) in self.cfg.freeze}
        return {path: x for path, x in flat.items() if path not in frozen}, frozen

    def join(self, trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `split`."""
        return traverse_util.unflatten_dict({**frozen, **trained}, sep="/")

    def learning_rate(self, peak: float) -> optax.Schedule:
        """Updates made before -> linear from `peak`/warm-up steps to `peak`, then a cosine."""
        warmup = round(self.cfg.warmup_ratio * self.steps)
        decay_steps = max(self.steps - warmup, 1)
        cosine = optax.cosine_decay_schedule(peak, decay_steps, self.cfg.final_lr_ratio)
        if warmup == 0:
            return cosine
        linear = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
        return optax.join_schedules([linear, cosine], [warmup])

    def transformation(self) -> optax.GradientTransformation:
        """The update of the flat trained parameters."""
        cfg = self.cfg
        peaks = {group: cfg.lr for group in GROUPS}
        if cfg.gate_lr is not None:
            peaks["gates"] = cfg.gate_lr

        def scale(peak):
            return optax.scale_by_learning_rate(self.learning_rate(peak))

        return optax.chain(
            optax.clip_by_global_norm(cfg.clip_norm),
            optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
            optax.add_decayed_weights(
                cfg.weight_decay, mask=lambda params: {path: is_decayed(path) for path in params}
            ),
            optax.partition(
                {group: scale(peak) for group, peak in peaks.items()},
                lambda params: {path: group_of(path) for path in params},
            ),
        )
