"""`selected_attention`: a tile of queries walks the union of its queries' blocks."""

import jax.numpy as jnp

from pallas_kernels.flash import attend
from pallas_kernels.schedule import Sight, Tiles

ROWS = 448  # 64 queries of 7 heads; more queries would share less of their blocks
FETCH = 8


def tiles(block):
    """The tiles for blocks of `block` keys; a tile visits the union of its queries' blocks."""
    return Tiles(ROWS, block, FETCH)


def selected_attention(q, k, v, blocks, pos, *, scale):
    """See `api.py`."""
    sight = Sight(jnp.zeros_like(pos), pos + 1, bits=blocks.bits)
    return attend(q, k, v, sight, scale, tiles(blocks.block))[0]
