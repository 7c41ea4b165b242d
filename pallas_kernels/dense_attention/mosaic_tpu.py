"""`dense_attention` on TPUs: intervals of key positions in any order.

Many queries attend by JAX's splash attention. Three cases take the kernel of the other branches, to
which the order of the keys does not matter. For few queries, as in decoding, sorting the keys would
cost more than to attend to them, and splash attention would read the keys anew for each head of a
group. Splash attention multiplies float32 with the precision of bfloat16. And it computes gradients
from its own results only, not from those that are merged over several sets of keys.
"""

import jax.numpy as jnp

from pallas_kernels.block_sizes.tpu import LANES
from pallas_kernels.dense_attention import splash
from pallas_kernels.flash_attention import mosaic_tpu as mosaic_flash
from pallas_kernels.flash_attention import mosaic_tpu_bwd as mosaic_flash_backward
from pallas_kernels.flash_attention.params import Job
from pallas_kernels.flash_attention.xla_tiles import Sight


def dense_attention(q, k, v, start, query_pos, key_pos, *, scale, interpret):
    """See `api.py`."""
    sight = Sight.of_positions(start, query_pos, key_pos)
    few = q.shape[1] * q.shape[2] // k.shape[2] <= LANES
    if few or q.dtype == jnp.float32:
        return mosaic_flash.attend(q, k, v, sight, _job(scale, interpret))[0]
    return splash.attend(q, k, v, sight, scale=scale, interpret=interpret)


def forward(q, k, v, start, query_pos, key_pos, *, scale, interpret):
    """See `part.py`."""
    sight = Sight.of_positions(start, query_pos, key_pos)
    return mosaic_flash.attend(q, k, v, sight, _job(scale, interpret))


def backward(residuals, dout, *, scale, interpret):
    """See `part.py`."""
    q, k, v, start, query_pos, key_pos, out, lse = residuals
    residuals = q, k, v, Sight.of_positions(start, query_pos, key_pos), out, lse
    return mosaic_flash_backward.backward(residuals, dout, _job(scale, interpret))


def _job(scale, interpret):
    return Job("dense_attention", scale, interpret)
