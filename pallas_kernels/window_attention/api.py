"""Attention over the most recent keys: the sliding window branch."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.block_sizes.supported import Call
from pallas_kernels.flash_attention.mask import KeyRangeMask
from pallas_kernels.flash_attention.params import KernelConfig
from pallas_kernels.window_attention import ref


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    pos: jax.Array,
    *,
    window: int,
    scale: float,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of each query over the keys max(start, pos - window + 1) .. pos.

    Args:
      q: float[b s n h] queries; query head i reads KV head i // (n // k).
      k: float[b t k h] keys.
      v: float[b t k h] values.
      start: i32[b s] index of the first key of the query's sequence.
      pos: i32[b s] index of the query's own key; -1 for a query that sees nothing.
      window: keys per query, its own included.
      scale: factor of the logits.
      implementation: None picks by platform; a named one runs or raises.
      interpret: run a Pallas kernel in the interpreter; the others ignore it.

    Returns:
      float[b s n h], dtype of `q`; exactly 0 where nothing is visible.

    Raises:
      ValueError: shapes disagree, or the platform or the sizes are not those of `implementation`.
      NotImplementedError: `implementation` has no kernel.
    """
    dispatch.bind_attention(
        q=(q, "b s n h"),
        k=(k, "b t k h"),
        v=(v, "b t k h"),
        start=(start, "b s"),
        pos=(pos, "b s"),
    )
    if implementation == dispatch.REFERENCE:
        return ref.window_attention(q, k, v, start, pos, window=window, scale=scale)
    call = Call.of("window_attention", q, k, v)
    backend = dispatch.resolve(implementation, call, interpret=interpret)
    config = KernelConfig(call.op, scale, interpret, max_distance=window)
    return backend.flash.attend(q, k, v, KeyRangeMask.of_window(start, pos, window), config)[0]
