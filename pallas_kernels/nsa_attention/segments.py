"""Where each query is in its packed sequence, and which blocks lie before it."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch


def token_positions(q, k, segment_ids, q_offset, block):
    """i32[b s] index of the first key of each query's sequence, and of its own; -1 for padding.

    Raises:
      ValueError: as `nsa_attention` about q_offset and segment_ids.
    """
    sizes = dispatch.bind_attention(q=(q, "b s n h"), k=(k, "b t k h"))
    b, s, t = sizes["b"], sizes["s"], sizes["t"]
    _check_offset(q_offset, s, t)
    pos = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32) + q_offset, (b, s))
    if segment_ids is None:
        return jnp.zeros_like(pos), pos
    dispatch.bind_dims(k=(k, "b t k h"), segment_ids=(segment_ids, "b t"))
    _check_segments(segment_ids, block)
    return segment_positions(segment_ids, q_offset, s)


def segment_positions(segment_ids, q_offset, count):
    """As i32[b s] the sequence's first key and the own key of the `count` queries at `q_offset`.

    Both are indices of `segment_ids`; the own one is -1 at padding.
    """
    at = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    start = jax.lax.cummax(jnp.where(begins, at, 0), axis=1)
    pos = jnp.where(segment_ids >= 0, at, -1)
    return tuple(jax.lax.dynamic_slice_in_dim(x, q_offset, count, axis=1) for x in (start, pos))


def visible_blocks(start, pos, block):
    """i32[b s 2] half-open range of the complete blocks of a query's sequence before it."""
    return jnp.stack([start, pos + 1], axis=-1) // block


def whole_blocks(x, block):
    """Appends zeros to x [b t ...] up to a multiple of `block`; no query sees them."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))


def _check_offset(q_offset, queries, keys):
    if isinstance(q_offset, jax.core.Tracer):
        return
    if not 0 <= q_offset <= keys - queries:
        raise ValueError(
            f"{q_offset=} puts {queries} queries outside of {keys} keys; it must be in "
            f"0..{keys - queries}"
        )


def _check_segments(segment_ids, block):
    if isinstance(segment_ids, jax.core.Tracer):
        return
    ids = np.asarray(segment_ids)
    begins = np.diff(ids, axis=1, prepend=-1) != 0
    row, index = np.nonzero(begins & (ids >= 0) & (np.arange(ids.shape[1]) % block != 0))
    if row.size:
        raise ValueError(
            f"segment_ids[{row[0]}] starts a segment at {index[0]}, not a multiple of the block "
            f"size {block}; pad the segment before it"
        )
