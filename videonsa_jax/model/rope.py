"""Rotary embeddings: each pair of channels (j, j + h/2) turns by position x frequency of pair j.

Angles are float32, one per token and pair; the text model and the vision tower differ only in
which coordinate of a token drives which pair.
"""

import jax
import jax.numpy as jnp
import numpy as np


def _frequencies(pairs: int, theta: float) -> np.ndarray:
    return (theta ** (-np.arange(pairs) / pairs)).astype(np.float32)


def mrope_angles(positions: jax.Array, section: tuple[int, int, int], theta: float) -> jax.Array:
    """Angles of the text model: `section` pairs follow the time, height and width ids.

    Args:
      positions: i32[b s 3].
      section: pairs per id; their sum is h/2.
      theta: base of the frequencies, which fall over all h/2 pairs.

    Returns:
      f32[b s h/2].
    """
    coordinate = np.repeat(np.arange(3), section)
    return positions[..., coordinate].astype(jnp.float32) * _frequencies(sum(section), theta)


def grid_angles(positions: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """Angles of the vision tower: the first half of the pairs follows the row, the rest the column.

    Args:
      positions: i32[b p 2] (row, column) of each patch.
      head_dim: h, a multiple of 4.
      theta: base of the frequencies; row and column use the same h/4 of them.

    Returns:
      f32[b p h/2].
    """
    pairs = head_dim // 4
    frequencies = np.tile(_frequencies(pairs, theta), 2)
    return positions[..., np.repeat(np.arange(2), pairs)].astype(jnp.float32) * frequencies


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns f[b s n h] by f32[b s h/2], computed in float32; returns the dtype of `x`."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
