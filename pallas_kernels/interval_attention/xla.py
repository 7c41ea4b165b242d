"""`interval_attention`: tiles about as long as a range."""

from pallas_kernels.flash import attend
from pallas_kernels.schedule import Sight, Tiles


def interval_attention(q, k, v, interval, *, max_length, scale):
    """See `api.py`."""
    size = min(max(max_length, 64), 512)
    tiles = Tiles(size * q.shape[2] // k.shape[2], size)
    return attend(q, k, v, Sight(interval[..., 0], interval[..., 1]), scale, tiles)[0]
