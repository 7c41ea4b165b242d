"""Native sparse attention of a device that holds a part of the keys; inside of `jax.shard_map`.

The block means of all devices are gathered: a block's worth of keys is one of them. The window
reaches back over the keys just before the part. Only the selected blocks lie anywhere: their branch
is left to `sharded.attend`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.block_mean.api import block_mean
from pallas_kernels.block_sparse.block_set import BlockSet
from pallas_kernels.compressed_attention.api import compressed_attention
from pallas_kernels.context_parallel.mesh_axis import DeviceAxis
from pallas_kernels.nsa_attention import api as nsa
from pallas_kernels.nsa_attention.spec import NSASpec
from pallas_kernels.window_attention.api import window_attention


class ShardBranches(NamedTuple):
    """Two branches, and what the third needs."""

    compressed: jax.Array  # float[b s n h]
    window: jax.Array  # float[b s n h]
    blocks: BlockSet  # the selected ones, of the blocks of all devices
    pos: jax.Array  # i32[b s] where the queries are in the whole stream; -1 at padding


def nsa_shard_branches(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    spec: NSASpec,
    axis: DeviceAxis,
    segment_ids: jax.Array,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
) -> ShardBranches:
    """The compressed and the window branch of `nsa_attention`, and the blocks it selects.

    Args:
      q: float[b s n h] this device's queries.
      k: float[b s k h] its keys, at the same positions.
      v: float[b s k h] its values.
      spec: sizes of the branches.
      axis: the devices.
      segment_ids: i32[b t] as in `nsa_attention`, of the whole stream.
      implementation: None picks by platform; a named one runs or raises.
      interpret: run Pallas kernels in the interpreter; the others ignore it.

    Raises:
      ValueError: shapes disagree, or a part is not a multiple of the block, or the platform or the
        sizes are not those of `implementation`.
      NotImplementedError: `implementation` has no kernel.
    """
    size = spec.block_size
    sizes = dispatch.bind_attention(q=(q, "b s n h"), k=(k, "b s k h"), v=(v, "b s k h"))
    if segment_ids.shape != (sizes["b"], sizes["s"] * axis.size):
        raise ValueError(
            f"segment_ids must be {(sizes['b'], sizes['s'] * axis.size)} for {axis.size} parts of "
            f"{sizes['s']}, got {segment_ids.shape}"
        )
    how = {"implementation": implementation, "interpret": interpret}
    scale, first = q.shape[-1] ** -0.5, axis.index() * sizes["s"]
    start, pos = nsa.places_of_segments(segment_ids, first, sizes["s"])

    means = [axis.gather(block_mean(x, block=size, **how)) for x in (k, v)]
    visible = nsa.visible_blocks(start, pos, spec)
    compressed, lse = compressed_attention(q, *means, visible, scale=scale, **how)
    blocks = nsa.select(q, means[0], lse, visible, pos, spec=spec, how=how)

    before = spec.window_size - 1
    near = [axis.extend(x, before=before) for x in (k, v)]
    near_start, near_pos = (jnp.maximum(x - first + before, 0) for x in (start, pos))
    near_pos = jnp.where(pos >= 0, near_pos, -1)
    window = window_attention(
        q, *near, near_start, near_pos, window=spec.window_size, scale=scale, **how
    )
    return ShardBranches(compressed, window, blocks, pos)
