"""`dense_attention` on NVIDIA GPUs: intervals of key positions in any order.

cuDNN (`jax.nn.dot_product_attention(implementation="cudnn")`) is not used: it masks by index, as a
causal triangle, a band or one length per row, while positions here are given per query and per key,
differ between rows, and are known only when the program runs. An additive bias could express them,
but it would hold all pairs.
"""

from pallas_kernels.flash_attention import triton as triton_flash
from pallas_kernels.flash_attention import triton_bwd as triton_flash_backward
from pallas_kernels.flash_attention.params import Job
from pallas_kernels.flash_attention.xla_tiles import Sight


def dense_attention(q, k, v, start, query_pos, key_pos, *, scale, interpret):
    """See `api.py`."""
    return forward(q, k, v, start, query_pos, key_pos, scale=scale, interpret=interpret)[0]


def forward(q, k, v, start, query_pos, key_pos, *, scale, interpret):
    """See `part.py`."""
    sight = Sight.of_positions(start, query_pos, key_pos)
    return triton_flash.attend(q, k, v, sight, _job(scale, interpret))


def backward(residuals, dout, *, scale, interpret):
    """See `part.py`."""
    q, k, v, start, query_pos, key_pos, out, lse = residuals
    residuals = q, k, v, Sight.of_positions(start, query_pos, key_pos), out, lse
    return triton_flash_backward.backward(residuals, dout, _job(scale, interpret))


def _job(scale, interpret):
    return Job("dense_attention", scale, interpret)
