"""The gated sum of the branches of native sparse attention."""

import jax.numpy as jnp


def combine(gates, branches, pos):
    """Sum of gate x branch in float32, rounded once.

    Args:
      gates: float[b s n 3].
      branches: three float[b s n h], in the order of the gates.
      pos: i32[b s]; the result is 0 where it is -1, whatever the gates hold.

    Returns:
      float[b s n h], dtype of the branches.
    """
    gates = jnp.where((pos >= 0)[..., None, None], gates, 0).astype(jnp.float32)
    terms = (gates[..., i, None] * x.astype(jnp.float32) for i, x in enumerate(branches))
    return sum(terms).astype(branches[0].dtype)
