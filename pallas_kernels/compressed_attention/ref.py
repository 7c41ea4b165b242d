"""Reference of `compressed_attention`."""

import jax.numpy as jnp

from pallas_kernels.reference import masked_attention


def compressed_attention(q, k, v, visible, *, scale):
    """Softmax over the block means j with visible[..., 0] <= j < visible[..., 1]."""
    j = jnp.arange(k.shape[1])
    see = (visible[..., :1] <= j) & (j < visible[..., 1:])  # [b s c]
    return masked_attention(q, k, v, see[:, None], scale=scale)
