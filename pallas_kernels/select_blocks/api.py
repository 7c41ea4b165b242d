"""Chooses, for each query and KV head, the blocks that the selected branch attends to."""

import dataclasses

import jax

from pallas_kernels import dispatch
from pallas_kernels.block_sizes.supported import Call
from pallas_kernels.block_sparse.block_set import BlockSet
from pallas_kernels.flash_attention.params import KernelConfig
from pallas_kernels.select_blocks import ref


@dataclasses.dataclass(frozen=True)
class SelectRule:
    """How many blocks, and which are always among them.

    Attributes:
      top_k: blocks per query in all.
      num_init_blocks: leading blocks of the query's sequence that are always chosen.
      num_local_blocks: trailing blocks that are always chosen; 1 is the query's own.
      block: keys per block.
    """

    top_k: int
    num_init_blocks: int
    num_local_blocks: int
    block: int


def select_blocks(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    visible: jax.Array,
    own: jax.Array,
    *,
    rule: SelectRule,
    scale: float,
    implementation: str | None = None,
    interpret: bool = False,
) -> BlockSet:
    """The forced blocks, then those with the most compressed softmax weight, ties to the lowest.

    A block's score is the sum over the group's query heads of exp(scale <q, k_j> - lse), as the
    compressed branch weighs it. The chosen set is that of `jax.lax.top_k` over these scores. No
    gradient flows through the choice.

    Args:
      q: float[b s n h] queries.
      k: float[b c k h] block means of the keys.
      lse: float32[b s n] of `compressed_attention`.
      visible: i32[b s 2] half-open range of blocks that have a score; it starts at the first block
        of the query's sequence.
      own: i32[b s] the block that holds the query; blocks after it are never chosen. -1 for a query
        that chooses nothing.
      rule: how many blocks and which are forced.
      scale: factor of the logits.
      implementation: None picks by platform; a named one runs or raises.
      interpret: run a Pallas kernel in the interpreter; the others ignore it.

    Returns:
      A `BlockSet` of at most `rule.top_k` blocks per query and KV head.

    Raises:
      ValueError: shapes disagree, or the platform or the sizes are not those of `implementation`.
      NotImplementedError: `implementation` has no kernel.
    """
    dispatch.bind_attention(
        q=(q, "b s n h"),
        k=(k, "b c k h"),
        lse=(lse, "b s n"),
        visible=(visible, "b s 2"),
        own=(own, "b s"),
    )
    q, k, lse = jax.lax.stop_gradient((q, k, lse))
    if implementation == dispatch.REFERENCE:
        return ref.select_blocks(q, k, lse, visible, own, rule=rule, scale=scale)
    call = Call.of("select_blocks", q, k, k, ranked=k.shape[1])
    backend = dispatch.resolve(implementation, call, interpret=interpret)
    config = KernelConfig(call.op, scale, interpret)
    return backend.select(q, k, lse, visible, own, rule, config)
