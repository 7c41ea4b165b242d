"""Reference of `block_mean`."""

import jax.numpy as jnp


def block_mean(x, *, block):
    """float[b t k h] -> float[b c k h]; accumulates in float32, rounds to the dtype of `x`."""
    b, t, k, h = x.shape
    return x.astype(jnp.float32).reshape(b, t // block, block, k, h).mean(2).astype(x.dtype)
