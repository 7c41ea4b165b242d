"""`dense_attention` as an interval of key positions."""

from pallas_kernels.flash_attention import xla as flash
from pallas_kernels.flash_attention.xla_tiles import Sight, Tiles

TILES = Tiles(rows=1024, block=512)


def dense_attention(q, k, v, start, query_pos, key_pos, *, scale):
    """See `api.py`."""
    return forward(q, k, v, start, query_pos, key_pos, scale=scale)[0]


def forward(q, k, v, start, query_pos, key_pos, *, scale):
    """See `part.py`."""
    return flash.attend(q, k, v, Sight.of_positions(start, query_pos, key_pos), scale, TILES)


def backward(residuals, dout, *, scale):
    """See `part.py`."""
    q, k, v, start, query_pos, key_pos, out, lse = residuals
    residuals = q, k, v, Sight.of_positions(start, query_pos, key_pos), out, lse
    return flash.backward(residuals, dout, scale, TILES)
