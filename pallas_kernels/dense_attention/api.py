"""Causal attention over all keys, positions given per query and per key."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.block_sizes.supported import Call
from pallas_kernels.dense_attention import ref
from pallas_kernels.flash_attention.mask import KeyRangeMask
from pallas_kernels.flash_attention.params import KernelConfig


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    start: jax.Array,
    query_pos: jax.Array,
    key_pos: jax.Array,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of each query over the keys with start <= key_pos <= query_pos.

    Positions need no order: keys and queries may be permuted freely. Memory is linear in s and t.

    Args:
      q: float[b s n h] queries; query head i reads KV head i // (n // k).
      k: float[b t k h] keys.
      v: float[b t k h] values.
      start: i32[b s] first position of the query's sequence.
      query_pos: i32[b s] position of each query; below `start` for one that sees nothing.
      key_pos: i32[b t] position of each key; negative for one that is never seen.
      scale: factor of the logits, None for h ** -0.5.
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
        query_pos=(query_pos, "b s"),
        key_pos=(key_pos, "b t"),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation == dispatch.REFERENCE:
        return ref.dense_attention(q, k, v, start, query_pos, key_pos, scale=scale)
    call = Call.of("dense_attention", q, k, v)
    backend = dispatch.resolve(implementation, call, interpret=interpret)
    mask = KeyRangeMask.of_positions(start, query_pos, key_pos)
    return backend.attend_dense(q, k, v, mask, KernelConfig(call.op, scale, interpret))
