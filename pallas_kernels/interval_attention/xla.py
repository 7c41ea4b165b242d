"""`interval_attention`: tiles about as long as a range."""

from pallas_kernels.flash_attention.xla import attend
from pallas_kernels.flash_attention.xla_tiles import Sight, Tiles


def tiles(max_length, group):
    """The tiles for ranges of at most `max_length` keys."""
    size = min(max(max_length, 64), 512)
    return Tiles(size * group, size)


def interval_attention(q, k, v, interval, *, max_length, scale):
    """See `api.py`."""
    sight = Sight(interval[..., 0], interval[..., 1])
    return attend(q, k, v, sight, scale, tiles(max_length, q.shape[2] // k.shape[2]))[0]
