"""`window_attention` on NVIDIA GPUs, as an interval of keys."""

import jax.numpy as jnp

from pallas_kernels.schedule import Sight
from pallas_kernels.triton_flash import attend
from pallas_kernels.triton_walk import Job


def window_attention(q, k, v, start, pos, *, window, scale, interpret):
    """See `api.py`."""
    job = Job("window_attention", scale, interpret, reach=window)
    sight = Sight(jnp.maximum(start, pos + 1 - window), pos + 1)
    return attend(q, k, v, sight, job)[0]
