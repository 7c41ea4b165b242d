"""What attention over chosen blocks has to multiply on a TPU, and what it does multiply.

Both count pairs of a query and a key, for one query head of each KV head.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse.block_set import BlockSet
from pallas_kernels.selected_attention.mosaic_tpu_tiles import Cut, Schedule


def executed_pairs(cut: Cut, schedule: Schedule) -> jax.Array:
    """i32[b k] pairs that the kernels visit, by the bounds that they walk.

    A step multiplies all queries of a tile by `cut.blocks` blocks, chosen or not.
    """
    steps = 0
    for bounds in schedule.bounds:
        first, whole, last = jnp.moveaxis(bounds[..., 0, :], -1, 0)
        for count in (whole - first, last - whole):
            steps += (-(-count // cut.blocks)).sum(-1)
    return steps * cut.queries * cut.blocks * cut.block


def chosen_pairs(blocks: BlockSet, pos: jax.Array, keys: int) -> jax.Array:
    """i32[b k] pairs of a query and a key that it sees."""
    begin = jnp.arange(-(-keys // blocks.block)) * blocks.block
    seen = jnp.minimum(pos + 1, keys)[..., None] - begin  # of each block, by each query
    seen = jnp.where(pos[..., None] >= 0, jnp.clip(seen, 0, blocks.block), 0)
    return jnp.where(blocks.members(len(begin)), seen[:, :, None], 0).sum((1, 3))
