"""`compressed_attention` on NVIDIA GPUs, as an interval of block means."""

from pallas_kernels.schedule import Sight
from pallas_kernels.triton_flash import attend
from pallas_kernels.triton_walk import Job


def compressed_attention(q, k, v, visible, *, scale, interpret):
    """See `api.py`."""
    job = Job("compressed_attention", scale, interpret)
    return attend(q, k, v, Sight(visible[..., 0], visible[..., 1]), job)
