"""The branches of native sparse attention: what is static about each, and what a query sees."""

import dataclasses

import jax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.block_sparse.block_set import BlockSet, ChosenKeys
from pallas_kernels.flash_attention.mask import KeyRangeMask
from pallas_kernels.flash_attention.params import KernelConfig
from pallas_kernels.nsa_attention.spec import NSASpec
from pallas_kernels.select_blocks.api import SelectRule

BLOCKS = "nsa_blocks"  # the selected blocks under `jax.checkpoint`: few bits, many operations


@dataclasses.dataclass(frozen=True)
class BranchConfigs:
    """What is static: a `KernelConfig` per step."""

    compressed: KernelConfig
    select: KernelConfig
    selected: KernelConfig
    window: KernelConfig

    @classmethod
    def of(cls, spec: NSASpec, scale: float, interpret: bool) -> "BranchConfigs":
        names = "compressed_attention", "select_blocks", "selected_attention"
        window = KernelConfig("window_attention", scale, interpret, max_distance=spec.window_size)
        return cls(*(KernelConfig(name, scale, interpret) for name in names), window)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BranchMasks:
    """What each query sees: of the block means, of the chosen blocks, of the keys near to it."""

    compressed: KeyRangeMask
    selected: ChosenKeys
    window: KeyRangeMask


def select_rule(spec: NSASpec) -> SelectRule:
    """How many blocks are selected, and which always are."""
    return SelectRule(spec.block_count, spec.forced_first, spec.forced_local, spec.block_size)


def choose(q, mean_k, lse, visible, pos, *, spec, backend, config) -> BlockSet:
    """The blocks that the weights of the compressed branch rank highest."""
    own = pos // spec.block_size  # -1 where pos is
    scored = jax.lax.stop_gradient((q, mean_k, lse))
    blocks = backend.select(*scored, visible, own, select_rule(spec), config)
    return dataclasses.replace(blocks, bits=checkpoint_name(blocks.bits, BLOCKS))
