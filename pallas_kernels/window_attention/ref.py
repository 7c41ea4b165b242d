"""Reference of `window_attention`."""

import jax.numpy as jnp

from pallas_kernels.reference import masked_attention


def window_attention(q, k, v, start, pos, *, window, scale):
    """Softmax over the last `window` keys, the query's own included, from `start` on."""
    t = jnp.arange(k.shape[1])
    start, pos = start[..., None], pos[..., None]
    see = (start <= t) & (pos - window < t) & (t <= pos)
    return masked_attention(q, k, v, see[:, None], scale=scale)[0]
