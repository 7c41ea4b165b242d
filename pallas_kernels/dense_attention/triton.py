"""`dense_attention` on NVIDIA GPUs: intervals of key positions in any order.

cuDNN (`jax.nn.dot_product_attention(implementation="cudnn")`) is not used: it masks by index, as a
causal triangle, a band or one length per row, while positions here are given per query and per key,
differ between rows, and are known only when the program runs. An additive bias could express them,
but it would hold all pairs.
"""

import jax.numpy as jnp

from pallas_kernels.job import Job
from pallas_kernels.schedule import Sight
from pallas_kernels.triton_flash import attend


def dense_attention(q, k, v, start, query_pos, key_pos, *, scale, interpret):
    """See `api.py`."""
    sight = Sight(jnp.maximum(start, 0), query_pos + 1, key_pos=key_pos)
    return attend(q, k, v, sight, Job("dense_attention", scale, interpret))[0]
