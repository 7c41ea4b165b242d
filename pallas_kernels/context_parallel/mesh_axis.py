"""Long arrays of which every device along a mesh axis holds a shard; for `jax.shard_map`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class MeshAxis:
    """Devices that hold consecutive, equally long shards of axis 1 of arrays [b t ...].

    Attributes:
      name: the mesh axis, or several that count as one.
      size: how many devices.
    """

    name: str | tuple[str, ...]
    size: int

    def index(self) -> jax.Array:
        """i32[] which shard this device holds."""
        return jax.lax.axis_index(self.name)

    def shard(self, x: jax.Array, index: jax.Array) -> jax.Array:
        """Shard number `index` of an array that every device holds."""
        length = x.shape[1] // self.size
        return jax.lax.dynamic_slice_in_dim(x, index * length, length, axis=1)

    def gather(self, x: jax.Array) -> jax.Array:
        """All shards, on every device; the gradient is summed over devices and split again."""
        return jax.lax.all_gather(x, self.name, axis=1, tiled=True)

    def ring_shift(self, tree: Any) -> Any:
        """Hands arrays to the next device, the last one's to the first."""
        pairs = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.name, pairs), tree)

    def halo_exchange(self, x: jax.Array, *, before: int, after: int = 0) -> jax.Array:
        """A shard, and what stands next to it in the shards of other devices.

        Args:
          x: [b t ...] this device's shard.
          before: how many entries of the shards before it; more than one shard's, if need be.
          after: how many entries of the shards after it.

        Returns:
          [b before+t+after ...]; zeros beyond both ends of the whole array.
        """
        left = [self._from(x, -hop, size) for hop, size in _hops(before, x.shape[1])]
        right = [self._from(x, hop, size) for hop, size in _hops(after, x.shape[1])]
        return jnp.concatenate([*left[::-1], x, *right], axis=1)

    def _from(self, x, distance, size):
        """The `size` nearest entries of the shard `distance` devices on."""
        x = x[:, -size:] if distance < 0 else x[:, :size]
        if abs(distance) >= self.size:
            return jnp.zeros_like(x)
        pairs = [(i + distance, i) for i in range(self.size) if 0 <= i + distance < self.size]
        return jax.lax.ppermute(x, self.name, pairs)


def _hops(count, length):
    """How many entries to take from the first, second, ... neighbour: (1, length), ..."""
    whole, rest = divmod(count, length)
    sizes = [length] * whole + [rest] * (rest > 0)
    return list(enumerate(sizes, start=1))
