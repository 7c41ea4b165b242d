"""`selected_attention` in plain JAX: a tile of queries visits the union of its queries' blocks."""

import jax.numpy as jnp

from pallas_kernels.flash_attention import xla as flash
from pallas_kernels.flash_attention.attention_kernels import AttentionKernels
from pallas_kernels.flash_attention.mask import KeyRangeMask


def forward(q, k, v, sees, config):
    """See `AttentionKernels`; `sees` are `ChosenKeys`."""
    return flash.forward(q, k, v, _mask(sees), config)


def backward(residuals, dout, config):
    """See `AttentionKernels`."""
    q, k, v, sees, out, lse = residuals
    return flash.backward((q, k, v, _mask(sees), out, lse), dout, config)


KERNELS = AttentionKernels(forward, backward)


def _mask(sees):
    pos, blocks = sees.pos, sees.blocks
    return KeyRangeMask(jnp.zeros_like(pos), pos + 1, bits=blocks.bits, block=blocks.block)
