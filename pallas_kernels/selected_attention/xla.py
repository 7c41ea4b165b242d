"""`selected_attention`: a tile of queries walks the union of its queries' blocks."""

import jax.numpy as jnp

from pallas_kernels.flash import attend
from pallas_kernels.schedule import Sight, Tiles

ROWS = 256  # few consecutive queries: they share most blocks, so that few logits are masked
BLOCKS, KEYS = 4, 128  # per step, at least


def tiles(block):
    """The tiles for blocks of `block` keys; a tile visits the union of its queries' blocks."""
    return Tiles(ROWS, block, fetch=max(BLOCKS, KEYS // block))


def selected_attention(q, k, v, blocks, pos, *, scale):
    """See `api.py`."""
    sight = Sight(jnp.zeros_like(pos), pos + 1, bits=blocks.bits)
    return attend(q, k, v, sight, scale, tiles(blocks.block))[0]
