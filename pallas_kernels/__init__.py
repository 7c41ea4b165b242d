"""Attention operations: arrays in, arrays out. Each runs by the implementation it is told."""

from pallas_kernels.block_mean.api import block_mean
from pallas_kernels.blocks import BlockSet
from pallas_kernels.compressed_attention.api import compressed_attention
from pallas_kernels.dense_attention.api import dense_attention
from pallas_kernels.interval_attention.api import interval_attention
from pallas_kernels.nsa import nsa_attention, nsa_blocks
from pallas_kernels.select_blocks.api import SelectRule, select_blocks
from pallas_kernels.selected_attention.api import selected_attention
from pallas_kernels.spec import NSASpec
from pallas_kernels.window_attention.api import window_attention

__all__ = [
    "BlockSet",
    "NSASpec",
    "SelectRule",
    "block_mean",
    "compressed_attention",
    "dense_attention",
    "interval_attention",
    "nsa_attention",
    "nsa_blocks",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
