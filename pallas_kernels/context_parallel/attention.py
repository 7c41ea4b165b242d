"""Attention of a device's queries over keys of which every device holds a shard.

For use inside of `jax.shard_map`. The keys come as streams, arrays that are sharded by themselves.
What a group of queries sees is a reader: `SelectedReader` or `DenseReader`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.block_sizes.supported import Call
from pallas_kernels.block_sparse.block_set import BlockSet, ChosenKeys
from pallas_kernels.context_parallel.mesh_axis import MeshAxis
from pallas_kernels.context_parallel.ring import ring_attention
from pallas_kernels.flash_attention.mask import KeyRangeMask
from pallas_kernels.flash_attention.params import KernelConfig

Mode = Literal["gather", "ring"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectedReader:
    """Sees chosen blocks of the first stream.

    Attributes:
      blocks: chosen among the blocks of all devices.
      pos: i32[b s] index in the whole stream of the last key that a query may see; -1 for none.
    """

    blocks: BlockSet
    pos: jax.Array

    def call(self, q, k, v):
        """What is asked of the kernels."""
        sizes = {"block": self.blocks.block, "chosen_from": k.shape[1]}
        return Call.of("selected_attention", q, k, v, **sizes)

    def kernels(self, backend):
        """The `AttentionKernels` that read so."""
        return backend.selected

    def attend(self, q, k, v, backend, config):
        """Attention over the keys of all devices."""
        return backend.selected.attend(q, k, v, ChosenKeys(self.blocks, self.pos), config)[0]

    def keys(self, streams):
        """The keys and the values that are read of streams, joined."""
        return streams[0]

    def gradients(self, dk, dv, streams):
        """The gradients of all streams, of those of `keys`."""
        return (dk, dv), *jax.tree.map(jnp.zeros_like, streams[1:])

    def sees(self, k, shard, axis):
        """What the queries see of k, the keys of shard number `shard`."""
        del axis
        count = k.shape[1] // self.blocks.block
        blocks = self.blocks.slice(shard * count, count)
        return ChosenKeys(blocks, jnp.maximum(self.pos - shard * k.shape[1], -1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseReader:
    """Sees all streams, by position as in `dense_attention`; its functions as `SelectedReader`'s.

    Attributes:
      start: i32[b s].
      query_pos: i32[b s].
      key_pos: i32[b t] per stream, of the keys of all devices.
    """

    start: jax.Array
    query_pos: jax.Array
    key_pos: tuple[jax.Array, ...]

    def call(self, q, k, v):
        return Call.of("dense_attention", q, k, v)

    def kernels(self, backend):
        return backend.flash

    def attend(self, q, k, v, backend, config):
        return backend.attend_dense(q, k, v, self._mask(self.key_pos), config)

    def keys(self, streams):
        return tuple(jnp.concatenate(x, axis=1) for x in zip(*streams, strict=True))

    def gradients(self, dk, dv, streams):
        ends = np.cumsum([k.shape[1] for k, _ in streams])[:-1]
        return tuple(zip(*(jnp.split(x, ends, axis=1) for x in (dk, dv)), strict=True))

    def sees(self, k, shard, axis):
        del k
        return self._mask([axis.shard(x, shard) for x in self.key_pos])

    def _mask(self, key_pos):
        key_pos = jnp.concatenate(key_pos, axis=1)
        return KeyRangeMask.of_positions(self.start, self.query_pos, key_pos)


def sharded_attention(
    queries: tuple[jax.Array, ...],
    streams: tuple[tuple[jax.Array, jax.Array], ...],
    readers: tuple[SelectedReader | DenseReader, ...],
    *,
    axis: MeshAxis,
    scale: float,
    mode: Mode,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Softmax attention of several groups of queries, each over what its reader sees.

    Args:
      queries: float[b s n h] per reader, this device's.
      streams: (keys, values) float[b t k h] each, this device's; t is a multiple of the block where
        a reader is a `SelectedReader`.
      readers: what each group of queries sees.
      axis: the devices.
      scale: factor of the logits.
      mode: "gather" copies all keys to every device; "ring" passes them round, so that a device
        holds two shards at a time.
      implementation: None picks by platform; a named one runs or raises.
      interpret: run Pallas kernels in the interpreter; the others ignore it.

    Returns:
      float[b s n h] per reader, exactly 0 where nothing is visible. The modes differ by rounding.

    Raises:
      ValueError: the platform or the sizes are not those of the implementation.
      NotImplementedError: it is "reference", which has no kernels.
    """
    if mode == "gather":
        streams = jax.tree.map(axis.gather, streams)
    backends, configs = [], []
    for reader, q in zip(readers, queries, strict=True):
        call = reader.call(q, *reader.keys(streams))
        backends.append(dispatch.resolve(implementation, call, interpret=interpret))
        configs.append(KernelConfig(call.op, scale, interpret))
    if mode == "ring":
        kernels = tuple(x.kernels(backend) for x, backend in zip(readers, backends, strict=True))
        return ring_attention(queries, streams, readers, axis, kernels, tuple(configs))
    return tuple(
        reader.attend(q, *reader.keys(streams), backend, config)
        for reader, q, backend, config in zip(readers, queries, backends, configs, strict=True)
    )
