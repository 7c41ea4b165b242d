"""How query heads meet KV heads in the released sparse attention."""

import dataclasses

import jax
import jax.numpy as jnp

from videonsa_jax.config.schema import RELEASED_GROUP


@dataclasses.dataclass(frozen=True)
class Heads:
    """Query heads in slots; slot p reads KV head p // (slots // kv).

    With copies, the heads are repeated as often as they fit into 16 slots per KV head, the slots
    left over are zero, and a head's output is the mean over its copies. For 28 heads over 4 that is
    two copies and 8 zero slots, and most copies read another KV head than the pretrained one.

    Attributes:
      query: number of query heads.
      kv: number of KV heads.
      copies: as released; else every query head has one slot: grouped-query attention.
    """

    query: int
    kv: int
    copies: bool

    @property
    def slots(self) -> int:
        """Slots in all."""
        return RELEASED_GROUP * self.kv if self.copies else self.query

    @property
    def count(self) -> int:
        """Copies of each head."""
        return self.slots // self.query

    def spread(self, q: jax.Array) -> jax.Array:
        """Heads f[b s n h] -> slots f[b s p h]."""
        spare = self.slots - self.count * self.query
        return jnp.pad(jnp.tile(q, (1, 1, self.count, 1)), ((0, 0), (0, 0), (0, spare), (0, 0)))

    def average(self, out: jax.Array) -> jax.Array:
        """Slots f[b s p h] -> heads f[b s n h], the mean over copies."""
        out = out[:, :, : self.count * self.query]
        return out.reshape(*out.shape[:2], self.count, self.query, -1).mean(2)

    def of_groups(self, x: jax.Array) -> jax.Array:
        """What is the same for all slots of a KV head: f[b s k h] -> f[b s p h]."""
        return jnp.repeat(x, self.slots // self.kv, axis=2)
