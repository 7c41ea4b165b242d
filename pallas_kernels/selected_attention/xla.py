"""`selected_attention`: a tile of queries walks the union of its queries' blocks."""

import jax.numpy as jnp

from pallas_kernels.flash import attend
from pallas_kernels.schedule import Sight, Tiles

ROWS = 256  # few consecutive queries: they share most blocks, so that few logits are masked
BLOCKS, KEYS = 4, 128  # per step, at least


def selected_attention(q, k, v, blocks, pos, *, scale):
    """See `api.py`."""
    tiles = Tiles(ROWS, blocks.block, fetch=max(BLOCKS, KEYS // blocks.block))
    sight = Sight(jnp.zeros_like(pos), pos + 1, bits=blocks.bits)
    return attend(q, k, v, sight, scale, tiles)[0]
