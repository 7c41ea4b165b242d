"""`window_attention` on TPUs, as an interval of keys."""

from pallas_kernels.flash_attention.mosaic_tpu import attend
from pallas_kernels.flash_attention.params import Job
from pallas_kernels.flash_attention.xla_tiles import Sight


def window_attention(q, k, v, start, pos, *, window, scale, interpret):
    """See `api.py`."""
    job = Job("window_attention", scale, interpret, reach=window)
    return attend(q, k, v, Sight.of_window(start, pos, window), job)[0]
