"""How the plain JAX attention cuts its work. Results depend on it by rounding only."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """The sizes of one operation.

    Attributes:
      block_q: rows of a tile at most: queries, a power of two, times the g heads that share a KV
        head.
      block_kv: consecutive keys that are fetched, or skipped, together.
      blocks_per_step: a step multiplies a tile's rows with `blocks_per_step * block_kv` keys.
    """

    block_q: int
    block_kv: int
    blocks_per_step: int = 1

    def queries(self, group: int) -> int:
        """Queries of a tile, where `group` query heads share a KV head."""
        return 1 << (max(self.block_q // group, 1).bit_length() - 1)


RANKED = BlockSizes(block_q=2048, block_kv=128)  # of `select_blocks`: block means
# 64 queries of 7 heads: more would share less of their blocks. The mask's blocks are fetched.
SELECTED = BlockSizes(block_q=448, block_kv=64, blocks_per_step=8)
WINDOW_ROWS, LEAST_QUERIES = 512, 64


def pick(config, group: int, block: int | None) -> BlockSizes:
    """The sizes for an operation.

    Args:
      config: its `KernelConfig`.
      group: query heads per KV head.
      block: keys per member block of the mask; None if it has none.
    """
    if block is not None:  # a tile visits the union of its queries' blocks
        return dataclasses.replace(SELECTED, block_kv=block)
    if config.name == "window_attention":  # one step takes all keys of a tile
        window = config.max_distance
        queries = max(min(WINDOW_ROWS // group, window), LEAST_QUERIES)
        block = min(window, LEAST_QUERIES)
        steps = -(-queries // block) + -(-(window - 1) // block)
        return BlockSizes(queries * group, block, steps)
    if config.name == "interval_attention":  # tiles about as long as a range
        size = min(max(config.max_distance, 64), 512)
        return BlockSizes(size * group, size)
    if config.name == "compressed_attention":
        return BlockSizes(block_q=2048, block_kv=128)
    return BlockSizes(block_q=1024, block_kv=512)
