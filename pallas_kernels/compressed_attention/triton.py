"""`compressed_attention` on NVIDIA GPUs, as an interval of block means."""

from pallas_kernels.flash_attention.params import Job
from pallas_kernels.flash_attention.triton import attend
from pallas_kernels.flash_attention.xla_tiles import Sight


def job(scale: float, interpret: bool) -> Job:
    """What is static about the operation."""
    return Job("compressed_attention", scale, interpret)


def compressed_attention(q, k, v, visible, *, scale, interpret):
    """See `api.py`."""
    return attend(q, k, v, Sight.of_blocks(visible), job(scale, interpret))
