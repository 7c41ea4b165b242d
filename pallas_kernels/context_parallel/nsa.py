"""Native sparse attention of a device that holds a shard of the keys; inside of `jax.shard_map`.

The block means of all devices are gathered: a block's worth of keys is one of them. The window
reaches back over the keys just before the shard. Only the selected blocks lie anywhere: their
branch is left to `sharded_attention`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.block_mean.api import block_mean
from pallas_kernels.block_sizes.supported import Call
from pallas_kernels.block_sparse.block_set import BlockSet
from pallas_kernels.context_parallel.mesh_axis import MeshAxis
from pallas_kernels.flash_attention.mask import KeyRangeMask
from pallas_kernels.nsa_attention.branches import BranchConfigs, choose
from pallas_kernels.nsa_attention.segments import segment_positions, visible_blocks
from pallas_kernels.nsa_attention.spec import NSASpec


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
    axis: MeshAxis,
    segment_ids: jax.Array,
    implementation: str | None = None,
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
      ValueError: shapes disagree, or a shard is not a multiple of the block, or the platform or the
        sizes are not those of `implementation`.
      NotImplementedError: it is "reference", which has no kernels.
    """
    size = spec.block_size
    sizes = dispatch.bind_attention(q=(q, "b s n h"), k=(k, "b s k h"), v=(v, "b s k h"))
    if segment_ids.shape != (sizes["b"], sizes["s"] * axis.size):
        raise ValueError(
            f"segment_ids must be {(sizes['b'], sizes['s'] * axis.size)} for {axis.size} shards of "
            f"{sizes['s']}, got {segment_ids.shape}"
        )
    means = [axis.gather(block_mean(x, block=size)) for x in (k, v)]
    call = Call.of("nsa_shard_branches", q, k, v, ranked=means[0].shape[1])
    backend = dispatch.resolve(implementation, call, interpret=interpret)
    configs = BranchConfigs.of(spec, q.shape[-1] ** -0.5, interpret)
    first = axis.index() * sizes["s"]
    start, pos = segment_positions(segment_ids, first, sizes["s"])

    visible = visible_blocks(start, pos, size)
    ranges = KeyRangeMask.of_ranges(visible)
    compressed, lse = backend.flash.attend(q, *means, ranges, configs.compressed)
    blocks = choose(
        q, means[0], lse, visible, pos, spec=spec, backend=backend, config=configs.select
    )

    before = spec.window_size - 1
    near_keys = [axis.halo_exchange(x, before=before) for x in (k, v)]
    near_start, near_pos = (jnp.maximum(x - first + before, 0) for x in (start, pos))
    near_pos = jnp.where(pos >= 0, near_pos, -1)
    near = KeyRangeMask.of_window(near_start, near_pos, spec.window_size)
    window, _ = backend.flash.attend(q, *near_keys, near, configs.window)
    return ShardBranches(compressed, window, blocks, pos)
