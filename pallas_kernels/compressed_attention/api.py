"""Attention over block means: the compressed branch, and the statistics that rank blocks."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.block_sizes.supported import Call
from pallas_kernels.compressed_attention import ref
from pallas_kernels.flash_attention.mask import KeyRangeMask
from pallas_kernels.flash_attention.params import KernelConfig


def compressed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of each query over a range of block means.

    Args:
      q: float[b s n h] queries; query head i reads KV head i // (n // k).
      k: float[b c k h] block means of the keys.
      v: float[b c k h] block means of the values.
      visible: i32[b s 2] half-open range of blocks that a query sees.
      scale: factor of the logits.
      implementation: None picks by platform; a named one runs or raises.
      interpret: run a Pallas kernel in the interpreter; the others ignore it.

    Returns:
      out float[b s n h], 0 where nothing is visible, and lse float32[b s n], the logarithm of the
      softmax denominator, -inf there. No gradient flows through lse.

    Raises:
      ValueError: shapes disagree, or the platform or the sizes are not those of `implementation`.
      NotImplementedError: `implementation` has no kernel.
    """
    dispatch.bind_attention(
        q=(q, "b s n h"), k=(k, "b c k h"), v=(v, "b c k h"), visible=(visible, "b s 2")
    )
    if implementation == dispatch.REFERENCE:
        out, lse = ref.compressed_attention(q, k, v, visible, scale=scale)
        return out, jax.lax.stop_gradient(lse)
    call = Call.of("compressed_attention", q, k, v)
    backend = dispatch.resolve(implementation, call, interpret=interpret)
    config = KernelConfig(call.op, scale, interpret)
    return backend.flash.attend(q, k, v, KeyRangeMask.of_ranges(visible), config)
