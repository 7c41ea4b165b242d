"""Reference of `interval_attention`."""

import jax.numpy as jnp

from pallas_kernels.reference import masked_attention


def interval_attention(q, k, v, interval, *, scale):
    """Softmax over the indices j with interval[..., 0] <= j < interval[..., 1]."""
    j = jnp.arange(k.shape[1])
    see = (interval[..., :1] <= j) & (j < interval[..., 1:])
    return masked_attention(q, k, v, see[:, None], scale=scale)[0]
