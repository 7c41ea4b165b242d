"""Reference of `selected_attention`."""

import jax.numpy as jnp

from pallas_kernels.block_sparse.block_set import unpack
from pallas_kernels.reference import masked_attention


def selected_attention(q, k, v, blocks, pos, *, scale):
    """Softmax over the keys of the chosen blocks up to and including the query's position."""
    t = jnp.arange(k.shape[1])
    members = unpack(blocks.bits, -(-k.shape[1] // blocks.block))  # [b s k c]
    see = members[..., t // blocks.block] & (t <= pos[..., None])[:, :, None]
    return masked_attention(q, k, v, see.swapaxes(1, 2), scale=scale)[0]
