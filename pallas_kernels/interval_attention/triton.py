"""`interval_attention` on NVIDIA GPUs."""

from pallas_kernels.interval_attention import xla
from pallas_kernels.schedule import Sight
from pallas_kernels.triton_flash import Job, attend


def interval_attention(q, k, v, interval, *, max_length, scale, interpret):
    """See `api.py`."""
    backward = xla.tiles(max_length, q.shape[2] // k.shape[2])
    job = Job("interval_attention", scale, backward, interpret, reach=max_length)
    return attend(q, k, v, Sight(interval[..., 0], interval[..., 1]), job)[0]
