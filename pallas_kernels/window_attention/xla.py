"""`window_attention` as an interval of keys."""

import jax.numpy as jnp

from pallas_kernels.flash import attend
from pallas_kernels.schedule import Sight, Tiles

TILES = Tiles(queries=64, block=64, fetch=5)


def window_attention(q, k, v, start, pos, *, window, scale):
    """See `api.py`."""
    sight = Sight(jnp.maximum(start, pos + 1 - window), pos + 1)
    return attend(q, k, v, sight, scale, TILES)[0]
