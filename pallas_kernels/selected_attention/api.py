"""Attention over chosen blocks of keys: the selected branch."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.block_sizes.supported import Call
from pallas_kernels.block_sparse.block_set import WORD, BlockSet, ChosenKeys
from pallas_kernels.flash_attention.params import KernelConfig
from pallas_kernels.selected_attention import ref


def selected_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: BlockSet,
    pos: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of each query over its own set of key blocks, causal by token.

    Args:
      q: float[b s n h] queries; query head i reads KV head i // (n // k).
      k: float[b t k h] keys.
      v: float[b t k h] values.
      blocks: the blocks chosen by each query and KV head.
      pos: i32[b s] index of the last key a query may see; -1 for a query that sees nothing.
      scale: factor of the logits.
      implementation: None picks by platform; a named one runs or raises.
      interpret: run a Pallas kernel in the interpreter; the others ignore it.

    Returns:
      float[b s n h], dtype of `q`; exactly 0 where nothing is visible.

    Raises:
      ValueError: shapes disagree, or the platform or the sizes are not those of `implementation`.
      NotImplementedError: `implementation` has no kernel.
    """
    sizes = dispatch.bind_attention(
        q=(q, "b s n h"),
        k=(k, "b t k h"),
        v=(v, "b t k h"),
        pos=(pos, "b s"),
        bits=(blocks.bits, "b s k words"),
    )
    if sizes["words"] * WORD * blocks.block < sizes["t"]:
        raise ValueError(
            f"bits has {sizes['words']} words of {WORD} blocks of {blocks.block}, too few for "
            f"{sizes['t']} keys"
        )
    if implementation == dispatch.REFERENCE:
        return ref.selected_attention(q, k, v, blocks, pos, scale=scale)
    call = Call.of("selected_attention", q, k, v, block=blocks.block, chosen_from=sizes["t"])
    backend = dispatch.resolve(implementation, call, interpret=interpret)
    config = KernelConfig(call.op, scale, interpret)
    return backend.selected.attend(q, k, v, ChosenKeys(blocks, pos), config)[0]
