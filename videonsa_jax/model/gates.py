"""Branch gates of native sparse attention."""

import jax
import jax.numpy as jnp
from flax import nnx

from videonsa_jax.config.schema import ModelConfig
from videonsa_jax.model.layers import Linear

BRANCHES = ("cmp", "slc", "swa")  # order of the last axis, fixed by released weights


class BranchGates(nnx.Module):
    """One gate per (token, query head, branch): sigmoid(out(gelu(hidden(x))) / temperature)."""

    def __init__(self, cfg: ModelConfig, *, layers: int, rngs: nnx.Rngs):
        d, self.num_heads = cfg.text.d_model, cfg.text.num_heads
        self.temperature = cfg.nsa.gate_temperature
        wide = (("mlp", d),)
        logits = ((None, self.num_heads * len(BRANCHES)),)  # head-major: 3 x head + branch
        self.hidden = Linear((("embed", d),), wide, bias=True, layers=layers, rngs=rngs)
        self.out = Linear(wide, logits, bias=True, layers=layers, rngs=rngs)

    @jax.named_scope("branch_gates")
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[b s d], after the layer's input norm -> f32[b s n 3], values in (0, 1)."""
        logits = self.out(jax.nn.gelu(self.hidden(x), approximate=False))
        logits = logits.reshape(*x.shape[:-1], self.num_heads, len(BRANCHES))
        return jax.nn.sigmoid(logits.astype(jnp.float32) / self.temperature)
