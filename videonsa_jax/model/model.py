"""VideoNSA: Qwen2.5-VL whose vision tokens may use native sparse attention."""

import jax
from flax import nnx

from videonsa_jax.batch import Batch, Cache
from videonsa_jax.config.schema import ComputeConfig, ModelConfig
from videonsa_jax.model.decoder import TextDecoder
from videonsa_jax.model.vision import VisionTower
from videonsa_jax.sharding.rules import Rules


class VideoNSA(nnx.Module):
    """Vision tower and text decoder; parameters only, all else is argument or result."""

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        compute: ComputeConfig = ComputeConfig(),  # noqa: B008 (frozen)
        rules: Rules = Rules(),  # noqa: B008 (frozen)
        rngs: nnx.Rngs,
    ):
        self.cfg, self.compute, self.rules = cfg, compute, rules
        self.vision = VisionTower(
            cfg.vision, cfg.text.d_model, compute=compute, rules=rules, rngs=rngs
        )
        self.text = TextDecoder(cfg, compute=compute, rules=rules, rngs=rngs)

    def __call__(self, batch: Batch, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """Runs a batch; with a cache, its keys are appended and all stored keys are seen.

        Args:
          batch: both streams; the vision stream may have no slots.
          cache: of earlier tokens of the same rows (one sequence per row), or empty.

        Returns:
          hidden: f[b s d] of the text stream after the final norm; with a cache, f[b 1 d] of each
            row's last token, text or vision, which predicts the next one.
          cache: with the batch's tokens added; None if none was given.
        """
        return self.text(self.vision(batch), batch, cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f[... d] after the final norm -> f32[... v]."""
        return self.text.logits(hidden)
