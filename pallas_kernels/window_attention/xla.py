"""`window_attention` as an interval of keys."""

from pallas_kernels.flash_attention.xla import attend
from pallas_kernels.flash_attention.xla_tiles import Sight, Tiles

LEAST, ROWS = 64, 512


def tiles(window, group):
    """The tiles for windows of `window` keys; one step takes all keys of a tile."""
    queries = max(min(ROWS // group, window), LEAST)
    block = min(window, LEAST)
    return Tiles(queries * group, block, fetch=-(-queries // block) + -(-(window - 1) // block))


def window_attention(q, k, v, start, pos, *, window, scale):
    """See `api.py`."""
    sight = Sight.of_window(start, pos, window)
    return attend(q, k, v, sight, scale, tiles(window, q.shape[2] // k.shape[2]))[0]
