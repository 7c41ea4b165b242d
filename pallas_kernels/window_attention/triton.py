"""`window_attention` on NVIDIA GPUs, as an interval of keys."""

from pallas_kernels.flash_attention.params import Job
from pallas_kernels.flash_attention.triton import attend
from pallas_kernels.flash_attention.xla_tiles import Sight


def job(window: int, scale: float, interpret: bool) -> Job:
    """What is static about the operation."""
    return Job("window_attention", scale, interpret, reach=window)


def window_attention(q, k, v, start, pos, *, window, scale, interpret):
    """See `api.py`."""
    sight = Sight.of_window(start, pos, window)
    return attend(q, k, v, sight, job(window, scale, interpret))[0]
