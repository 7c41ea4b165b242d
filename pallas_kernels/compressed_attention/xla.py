"""`compressed_attention` as an interval of block means."""

from pallas_kernels.flash_attention.xla import attend
from pallas_kernels.flash_attention.xla_tiles import Sight, Tiles

TILES = Tiles(rows=2048, block=128)


def compressed_attention(q, k, v, visible, *, scale):
    """See `api.py`."""
    return attend(q, k, v, Sight.of_blocks(visible), scale, TILES)
