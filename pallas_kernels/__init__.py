"""Attention operations: arrays in, arrays out. Each runs by the implementation it is told."""

from pallas_kernels import block_sizes
from pallas_kernels.backends import BACKENDS, Backend
from pallas_kernels.block_mean.api import block_mean
from pallas_kernels.block_sparse.block_set import BlockSet, ChosenKeys
from pallas_kernels.compressed_attention.api import compressed_attention
from pallas_kernels.context_parallel.attention import (
    DenseReader,
    SelectedReader,
    sharded_attention,
)
from pallas_kernels.context_parallel.mesh_axis import MeshAxis
from pallas_kernels.context_parallel.nsa import ShardBranches, nsa_shard_branches
from pallas_kernels.dense_attention.api import dense_attention
from pallas_kernels.flash_attention.attention_kernels import AttentionKernels
from pallas_kernels.flash_attention.mask import KeyRangeMask
from pallas_kernels.flash_attention.params import KernelConfig
from pallas_kernels.interval_attention.api import interval_attention
from pallas_kernels.nsa_attention.api import nsa_attention, nsa_blocks
from pallas_kernels.nsa_attention.branches import BLOCKS
from pallas_kernels.nsa_attention.gating import combine
from pallas_kernels.nsa_attention.spec import NSASpec
from pallas_kernels.select_blocks.api import SelectRule, select_blocks
from pallas_kernels.selected_attention.api import selected_attention
from pallas_kernels.window_attention.api import window_attention

__all__ = [
    "BACKENDS",
    "BLOCKS",
    "AttentionKernels",
    "Backend",
    "BlockSet",
    "ChosenKeys",
    "DenseReader",
    "KernelConfig",
    "KeyRangeMask",
    "MeshAxis",
    "NSASpec",
    "SelectRule",
    "SelectedReader",
    "ShardBranches",
    "block_mean",
    "block_sizes",
    "combine",
    "compressed_attention",
    "dense_attention",
    "interval_attention",
    "nsa_attention",
    "nsa_blocks",
    "nsa_shard_branches",
    "select_blocks",
    "selected_attention",
    "sharded_attention",
    "window_attention",
]
