"""`dense_attention` on TPUs: ranges of key positions in any order.

Many queries attend by JAX's splash attention. Two cases take the kernel of the other branches, to
which the order of the keys does not matter. For few queries, as in decoding, sorting the keys would
cost more than to attend to them, and splash attention would read the keys anew for each head of a
group. Splash attention multiplies float32 with the precision of bfloat16. (It also computes
gradients from its own results only, not from those that are merged over several sets of keys, so
context parallelism does not run it either.)
"""

import jax.numpy as jnp

from pallas_kernels.block_sizes.tpu import LANES
from pallas_kernels.dense_attention import splash
from pallas_kernels.flash_attention import mosaic_tpu as flash


def attend(q, k, v, mask, config):
    """See `Backend.dense`."""
    few = q.shape[1] * q.shape[2] // k.shape[2] <= LANES
    if few or q.dtype == jnp.float32:
        return flash.KERNELS.attend(q, k, v, mask, config)[0]
    return splash.attend(q, k, v, mask, config)
