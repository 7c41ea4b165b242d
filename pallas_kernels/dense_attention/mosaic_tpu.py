"""`dense_attention` on TPUs: intervals of key positions in any order."""

import jax.numpy as jnp

from pallas_kernels import mosaic_flash, mosaic_flash_backward
from pallas_kernels.job import Job
from pallas_kernels.schedule import Sight


def dense_attention(q, k, v, start, query_pos, key_pos, *, scale, interpret):
    """See `api.py`."""
    return forward(q, k, v, start, query_pos, key_pos, scale=scale, interpret=interpret)[0]


def forward(q, k, v, start, query_pos, key_pos, *, scale, interpret):
    """See `part.py`."""
    sight = _sight(start, query_pos, key_pos)
    return mosaic_flash.attend(q, k, v, sight, _job(scale, interpret))


def backward(residuals, dout, *, scale, interpret):
    """See `part.py`."""
    q, k, v, start, query_pos, key_pos, out, lse = residuals
    residuals = q, k, v, _sight(start, query_pos, key_pos), out, lse
    return mosaic_flash_backward.backward(residuals, dout, _job(scale, interpret))


def _sight(start, query_pos, key_pos):
    return Sight(jnp.maximum(start, 0), query_pos + 1, key_pos=key_pos)


def _job(scale, interpret):
    return Job("dense_attention", scale, interpret)
