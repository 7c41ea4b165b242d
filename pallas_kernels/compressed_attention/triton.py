"""`compressed_attention` on NVIDIA GPUs, as an interval of block means."""

from pallas_kernels.compressed_attention import xla
from pallas_kernels.schedule import Sight
from pallas_kernels.triton_flash import Job, attend


def compressed_attention(q, k, v, visible, *, scale, interpret):
    """See `api.py`."""
    job = Job("compressed_attention", scale, xla.TILES, interpret)
    return attend(q, k, v, Sight(visible[..., 0], visible[..., 1]), job)
