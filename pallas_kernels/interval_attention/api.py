"""Bidirectional attention inside contiguous ranges: windows and frames of a vision tower."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.block_sizes.supported import Call
from pallas_kernels.flash_attention.mask import KeyRangeMask
from pallas_kernels.flash_attention.params import KernelConfig
from pallas_kernels.interval_attention import ref


def interval_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    interval: jax.Array,
    max_length: int,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of each patch over a half-open range of indices that holds it.

    For a fixed `max_length` memory is linear in p, and so is the work but for one comparison of
    positions per tile and key.

    Args:
      q: float[b p n h] queries; query head i reads KV head i // (n // k).
      k: float[b p k h] keys.
      v: float[b p k h] values.
      interval: i32[b p 2] range of patch i, interval[i, 0] <= i < interval[i, 1]; equal ends for a
        patch that sees nothing.
      max_length: the most indices that a range spans; it sizes the tiles.
      scale: factor of the logits, None for h ** -0.5.
      implementation: None picks by platform; a named one runs or raises.
      interpret: run a Pallas kernel in the interpreter; the others ignore it.

    Returns:
      float[b p n h], dtype of `q`; exactly 0 where nothing is visible.

    Raises:
      ValueError: shapes disagree, or `max_length` is not positive, or the platform or the sizes are
        not those of `implementation`.
      NotImplementedError: `implementation` has no kernel.
    """
    dispatch.bind_attention(
        q=(q, "b p n h"), k=(k, "b p k h"), v=(v, "b p k h"), interval=(interval, "b p 2")
    )
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation == dispatch.REFERENCE:
        return ref.interval_attention(q, k, v, interval, scale=scale)
    call = Call.of("interval_attention", q, k, v)
    backend = dispatch.resolve(implementation, call, interpret=interpret)
    config = KernelConfig(call.op, scale, interpret, max_distance=max_length)
    return backend.flash.attend(q, k, v, KeyRangeMask.of_ranges(interval), config)[0]
