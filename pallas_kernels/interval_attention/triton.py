"""`interval_attention` on NVIDIA GPUs."""

from pallas_kernels.flash_attention.params import Job
from pallas_kernels.flash_attention.triton import attend
from pallas_kernels.flash_attention.xla_tiles import Sight


def interval_attention(q, k, v, interval, *, max_length, scale, interpret):
    """See `api.py`."""
    job = Job("interval_attention", scale, interpret, reach=max_length)
    return attend(q, k, v, Sight(interval[..., 0], interval[..., 1]), job)[0]
