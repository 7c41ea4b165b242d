"""`selected_attention`: a tile of queries walks the union of its queries' blocks."""

import jax.numpy as jnp

from pallas_kernels.flash_attention import xla as flash
from pallas_kernels.flash_attention.xla_tiles import Sight, Tiles

ROWS = 448  # 64 queries of 7 heads; more queries would share less of their blocks
FETCH = 8


def tiles(block):
    """The tiles for blocks of `block` keys; a tile visits the union of its queries' blocks."""
    return Tiles(ROWS, block, FETCH)


def selected_attention(q, k, v, blocks, pos, *, scale):
    """See `api.py`."""
    return forward(q, k, v, blocks, pos, scale=scale)[0]


def forward(q, k, v, blocks, pos, *, scale):
    """See `part.py`."""
    return flash.attend(q, k, v, _sight(blocks, pos), scale, tiles(blocks.block))


def backward(residuals, dout, *, scale):
    """See `part.py`."""
    q, k, v, blocks, pos, out, lse = residuals
    residuals = q, k, v, _sight(blocks, pos), out, lse
    return flash.backward(residuals, dout, scale, tiles(blocks.block))


def _sight(blocks, pos):
    return Sight(jnp.zeros_like(pos), pos + 1, bits=blocks.bits)
