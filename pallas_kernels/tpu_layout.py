"""How arrays lie in a TPU's registers: heads of 128 lanes side by side, products, masks.

A register holds LANES lanes. Heads are filled up to it with zeros.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sizes.tpu import LANES


def product(x, y, x_axis, y_axis):
    """Matrix product over one axis of each, accumulated in float32; float32 factors count whole."""
    exact = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def column(row, lanes):
    """A row [1 m] -> [m lanes]: the same along every row."""
    return jnp.broadcast_to(row, (lanes, row.shape[1])).T


def kept(x, keep):
    """Zeros where bool `keep`, which was compared in 32 bits, is False."""
    return jnp.where(keep, x.astype(jnp.float32), 0.0).astype(x.dtype)


def head_lanes(i):
    """The lanes of head i of a group."""
    return slice(i * LANES, (i + 1) * LANES)


def flat(x, length):
    """[b s n h] -> [b length n*LANES], zeros where nothing was."""
    b, _, n, h = x.shape
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, LANES - h)))
    return x.reshape(b, length, n * LANES)
