"""Attention of a device's queries over keys of which every device holds a part.

For use inside of `jax.shard_map`. The keys come as streams, arrays that are split by themselves.
What a group of queries sees is a reader: `Selected` or `Dense`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.block_sparse.block_set import BlockSet
from pallas_kernels.context_parallel.mesh_axis import DeviceAxis
from pallas_kernels.context_parallel.ring import ring_attention
from pallas_kernels.dense_attention import partial as dense
from pallas_kernels.dense_attention.api import dense_attention
from pallas_kernels.selected_attention import partial as selected
from pallas_kernels.selected_attention.api import selected_attention

Mode = Literal["gather", "ring"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static.

    Attributes:
      axis: the devices.
      scale: factor of the logits.
      implementation: None picks by platform; a named one runs or raises.
      interpret: run Pallas kernels in the interpreter; the others ignore it.
    """

    axis: DeviceAxis
    scale: float
    implementation: dispatch.Implementation | None = None
    interpret: bool = False

    def how(self):
        """How attention is computed, as keyword arguments."""
        return {x: getattr(self, x) for x in ("scale", "implementation", "interpret")}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selected:
    """Sees chosen blocks of the first stream.

    Attributes:
      blocks: chosen among the blocks of all devices.
      pos: i32[b s] index in the whole stream of the last key that a query may see; -1 for none.
    """

    blocks: BlockSet
    pos: jax.Array

    def attend(self, q, keys, settings):
        """Attention over the keys of all devices."""
        return selected_attention(q, *keys[0], self.blocks, self.pos, **settings.how())

    def forward(self, q, keys, shard, settings):
        """out and lse over the keys of device number `shard`, which are here."""
        k, v = keys[0]
        return selected.forward(q, k, v, *self._of(k, shard), **settings.how())

    def backward(self, q, keys, shard, results, settings):
        """dq and, shaped as `keys`, dkeys; `results` are out, lse and dout."""
        (k, v), *others = keys
        out, lse, dout = results
        residuals = q, k, v, *self._of(k, shard), out, lse
        dq, *dkeys = selected.backward(residuals, dout, **settings.how())
        return dq, (tuple(dkeys), *jax.tree.map(jnp.zeros_like, others))

    def _of(self, k, shard):
        count = k.shape[1] // self.blocks.block
        blocks = self.blocks.part(shard * count, count)
        return blocks, jnp.maximum(self.pos - shard * k.shape[1], -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Sees all streams, by position as in `dense_attention`.

    Attributes:
      start: i32[b s].
      query_pos: i32[b s].
      key_pos: i32[b t] per stream, of the keys of all devices.
    """

    start: jax.Array
    query_pos: jax.Array
    key_pos: tuple[jax.Array, ...]

    def attend(self, q, keys, settings):
        """As that of `Selected`."""
        return dense_attention(
            q,
            *_joined(keys),
            start=self.start,
            query_pos=self.query_pos,
            key_pos=jnp.concatenate(self.key_pos, axis=1),
            **settings.how(),
        )

    def forward(self, q, keys, shard, settings):
        """As that of `Selected`."""
        places = self._of(shard, settings.axis)
        return dense.forward(q, *_joined(keys), places, **settings.how())

    def backward(self, q, keys, shard, results, settings):
        """As that of `Selected`."""
        out, lse, dout = results
        residuals = q, *_joined(keys), *self._of(shard, settings.axis), out, lse
        dq, *dkeys = dense.backward(residuals, dout, **settings.how())
        ends = np.cumsum([k.shape[1] for k, _ in keys])[:-1]
        return dq, tuple(zip(*(jnp.split(x, ends, axis=1) for x in dkeys), strict=True))

    def _of(self, shard, axis):
        key_pos = [axis.part(x, shard) for x in self.key_pos]
        return self.start, self.query_pos, jnp.concatenate(key_pos, axis=1)


def _joined(keys):
    """All streams' keys, and all their values."""
    return [jnp.concatenate(x, axis=1) for x in zip(*keys, strict=True)]


def attend(queries, keys, readers, *, settings: Settings, mode: Mode):
    """Softmax attention of several groups of queries, each over what its reader sees.

    Args:
      queries: float[b s n h] per reader, this device's.
      keys: (keys, values) float[b t k h] per stream, this device's; t is a multiple of the block
        where a reader is `Selected`.
      readers: what each group of queries sees.
      settings: what is static.
      mode: "gather" copies all keys to every device; "ring" passes them round, so that a device
        holds two parts at a time.

    Returns:
      float[b s n h] per reader, exactly 0 where nothing is visible. The modes differ by rounding.

    Raises:
      ValueError: the platform or the sizes are not those of the implementation.
      NotImplementedError: the implementation has no kernel.
    """
    if mode == "ring":
        return ring_attention(queries, keys, readers, settings)
    keys = jax.tree.map(settings.axis.gather, keys)
    pairs = zip(readers, queries, strict=True)
    return tuple(reader.attend(q, keys, settings) for reader, q in pairs)
