"""`dense_attention` as an interval of key positions."""

import jax.numpy as jnp

from pallas_kernels.flash import attend
from pallas_kernels.schedule import Sight, Tiles

TILES = Tiles(rows=1024, block=512)


def dense_attention(q, k, v, start, query_pos, key_pos, *, scale):
    """See `api.py`."""
    sight = Sight(jnp.maximum(start, 0), query_pos + 1, key_pos=key_pos)
    return attend(q, k, v, sight, scale, TILES)[0]
