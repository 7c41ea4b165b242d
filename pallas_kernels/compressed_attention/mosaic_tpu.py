"""`compressed_attention` on TPUs, as an interval of block means."""

from pallas_kernels.job import Job
from pallas_kernels.mosaic_flash import attend
from pallas_kernels.schedule import Sight


def compressed_attention(q, k, v, visible, *, scale, interpret):
    """See `api.py`."""
    job = Job("compressed_attention", scale, interpret)
    return attend(q, k, v, Sight.of_blocks(visible), job)
