"""`interval_attention` on NVIDIA GPUs."""

from pallas_kernels.job import Job
from pallas_kernels.schedule import Sight
from pallas_kernels.triton_flash import attend


def interval_attention(q, k, v, interval, *, max_length, scale, interpret):
    """See `api.py`."""
    job = Job("interval_attention", scale, interpret, reach=max_length)
    return attend(q, k, v, Sight(interval[..., 0], interval[..., 1]), job)[0]
