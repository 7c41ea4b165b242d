"""Attention of a query of zero: the plain mean of the values it sees, by prefix sums."""

import jax
import jax.numpy as jnp

from pallas_kernels import BlockSet
from videonsa_jax.model.released.layout import in_order, take


def so_far(values: jax.Array, rank: jax.Array, at: jax.Array, like: jax.Array) -> jax.Array:
    """The mean of all values up to and with each token's own.

    Args:
      values: f[b t k h] of all tokens, in any order.
      rank: i32[b t] their places in the row; -1 at padding.
      at: i32[b s] places of the tokens that want the mean.
      like: f[b s n h] gives the number of heads and the dtype.

    Returns:
      f[b s n h], head i from KV head i // (n // k).
    """
    ordered = in_order(values.astype(jnp.float32), rank, rank.shape[1])
    count = jnp.arange(1, rank.shape[1] + 1, dtype=jnp.float32)[:, None, None]
    mean = take(jnp.cumsum(ordered, axis=1) / count, at)
    return jnp.repeat(mean, like.shape[2] // values.shape[2], axis=2).astype(like.dtype)


def in_range(values: jax.Array, visible: jax.Array) -> jax.Array:
    """The mean of values f[b t k h] in half-open ranges i32[b s 2] -> f32[b s k h], 0 if empty."""
    before = _before(values)
    low, high = visible[..., 0], visible[..., 1]
    total = take(before, high) - take(before, low)
    some = (high > low)[..., None, None]
    return jnp.where(some, total / jnp.maximum(high - low, 1)[..., None, None], 0)


def in_window(values: jax.Array, slot: jax.Array, first: jax.Array, window: int) -> jax.Array:
    """The mean of the last `window` values, the slot's own included -> f32[b s k h]."""
    low = jnp.maximum(first[:, None], slot + 1 - window)
    return in_range(values, jnp.stack([low, slot + 1], axis=-1))


def in_blocks(values: jax.Array, blocks: BlockSet, slot: jax.Array, first: jax.Array) -> jax.Array:
    """The mean of the values up to each slot in its chosen blocks -> f32[b s k h].

    Args:
      values: f[b l k h], l a multiple of the block; zero at unused slots.
      blocks: of each slot and KV head.
      slot: i32[b s].
      first: i32[b] the first slot in use, in block 0.
    """
    b, _, k, h = values.shape
    size = blocks.block
    tiles = values.astype(jnp.float32).reshape(b, -1, size, k, h)
    chosen = blocks.members(tiles.shape[1]).astype(jnp.float32)  # [b s k c]
    own = slot // size
    j = jnp.arange(tiles.shape[1])
    earlier = chosen * (j < own[..., None])[:, :, None]
    lengths = jnp.where(j == 0, size - first[:, None], size).astype(jnp.float32)
    total = jnp.einsum("bskc,bckh->bskh", earlier, tiles.sum(2), precision="highest")
    count = jnp.einsum("bskc,bc->bsk", earlier, lengths)
    here = jnp.take_along_axis(chosen, jnp.maximum(own, 0)[..., None, None], axis=3)  # [b s k 1]
    to_here = take(jnp.cumsum(tiles, axis=2).reshape(values.shape), slot)
    inside = slot % size + 1 - jnp.where(own == 0, first[:, None], 0)
    total += here * to_here
    count += here[..., 0] * inside[..., None]
    return total / jnp.maximum(count, 1)[..., None]


def _before(values: jax.Array) -> jax.Array:
    """f[b t ...] -> f32[b t+1 ...]: at i, the sum of the first i."""
    sums = jnp.cumsum(values.astype(jnp.float32), axis=1)
    return jnp.pad(sums, [(0, 0), (1, 0)] + [(0, 0)] * (values.ndim - 2))
