"""`selected_attention`: a tile of queries walks the union of its queries' blocks."""

import jax.numpy as jnp

from pallas_kernels.flash import attend
from pallas_kernels.schedule import Sight, Tiles

QUERIES = 32  # consecutive queries share most blocks: few rows are masked, many share a fetch
KEYS = 256  # per step


def selected_attention(q, k, v, blocks, pos, *, scale):
    """See `api.py`."""
    tiles = Tiles(QUERIES, blocks.block, max(KEYS // blocks.block, 1))
    sight = Sight(jnp.zeros_like(pos), pos + 1, bits=blocks.bits)
    return attend(q, k, v, sight, scale, tiles)[0]
