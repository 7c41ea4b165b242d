"""`compressed_attention` on TPUs, as an interval of block means."""

from pallas_kernels.flash_attention.mosaic_tpu import attend
from pallas_kernels.flash_attention.params import Job
from pallas_kernels.flash_attention.xla_tiles import Sight


def compressed_attention(q, k, v, visible, *, scale, interpret):
    """See `api.py`."""
    job = Job("compressed_attention", scale, interpret)
    return attend(q, k, v, Sight.of_blocks(visible), job)
