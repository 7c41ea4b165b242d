"""`compressed_attention` on NVIDIA GPUs, as an interval of block means."""

from pallas_kernels.job import Job
from pallas_kernels.schedule import Sight
from pallas_kernels.triton_flash import attend


def job(scale: float, interpret: bool) -> Job:
    """What is static about the operation."""
    return Job("compressed_attention", scale, interpret)


def compressed_attention(q, k, v, visible, *, scale, interpret):
    """See `api.py`."""
    return attend(q, k, v, Sight.of_blocks(visible), job(scale, interpret))
