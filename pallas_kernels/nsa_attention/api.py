"""Native sparse attention: three branches over the same keys, gated and summed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import dispatch
from pallas_kernels.block_mean.api import block_mean
from pallas_kernels.block_sizes import supported as limits
from pallas_kernels.block_sparse.block_set import BlockSet
from pallas_kernels.compressed_attention.api import compressed_attention
from pallas_kernels.nsa_attention import triton as triton_nsa
from pallas_kernels.nsa_attention.gating import combine
from pallas_kernels.nsa_attention.spec import NSASpec
from pallas_kernels.select_blocks.api import SelectRule, select_blocks
from pallas_kernels.selected_attention.api import selected_attention
from pallas_kernels.window_attention.api import window_attention

BLOCKS = "nsa_blocks"  # the selected blocks under `jax.checkpoint`: few bits, many operations


def nsa_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: jax.Array,
    *,
    spec: NSASpec,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
    segment_ids: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
) -> jax.Array:
    """Causal attention through compressed blocks, selected blocks and a sliding window.

    With B = block_size, a query at position t attends, each branch with its own softmax, to
      compressed  the mean key and value of every block j with (j + 1) B - 1 <= t,
      selected    the keys u <= t of its `block_count` blocks (see `select_blocks`),
      window      the last `window_size` keys, t included,
    and returns the sum of gate x branch. Logits are scaled by h ** -0.5.

    Source: arXiv:2502.11089; arXiv:2510.02295 sec. 2.2.

    Args:
      q: float[b s n h] queries, rotated; query head i reads KV head i // (n // k).
      k: float[b t k h] keys, rotated.
      v: float[b t k h] values.
      gates: float[b s n 3] in the order (compressed, selected, window), after the sigmoid: not
        negative.
      spec: sizes of the branches.
      implementation: None picks by platform; a named one runs or raises.
      interpret: run Pallas kernels in the interpreter; the others ignore it.
      segment_ids: i32[b t], which packed sequence a key belongs to; -1 is padding, which sees
        nothing, is seen by nothing and returns 0. A segment is contiguous and starts at a multiple
        of B. None: one sequence per row.
      q_offset: index of the key at the position of query 0; query i is at q_offset + i.

    Returns:
      float[b s n h], dtype of `q`.

    Raises:
      ValueError: shapes disagree, or queries lie beyond the keys, or a segment does not start at a
        multiple of B (both checked where the arrays are concrete, that is, outside of jit), or the
        platform or the sizes are not those of `implementation`.
      NotImplementedError: `implementation` has no kernel.
    """
    dispatch.bind_attention(
        q=(q, "b s n h"), k=(k, "b t k h"), v=(v, "b t k h"), gates=(gates, "b s n 3")
    )
    start, pos = _places(q, k, segment_ids, q_offset, spec.block_size)
    how = _how(q, k, v, spec.block_size, implementation, interpret)
    scale = q.shape[-1] ** -0.5

    k, v = (_whole_blocks(x, spec.block_size) for x in (k, v))
    means = tuple(block_mean(x, block=spec.block_size, **how) for x in (k, v))
    visible = visible_blocks(start, pos, spec)
    compressed = compressed_attention(q, *means, visible, scale=scale, **how)
    blocks = select(q, means[0], compressed[1], visible, pos, spec=spec, how=how)
    if how["implementation"] == "triton":
        compressed = jax.lax.stop_gradient(compressed)
        places = triton_nsa.Places(visible, blocks, start, pos)
        settings = triton_nsa.Settings(spec.window_size, scale, interpret)
        return triton_nsa.gated_attention(q, k, v, means, gates, compressed, places, settings)
    selected = selected_attention(q, k, v, blocks, pos, scale=scale, **how)
    window = window_attention(q, k, v, start, pos, window=spec.window_size, scale=scale, **how)
    return combine(gates, (compressed[0], selected, window), pos)


def nsa_blocks(
    q: jax.Array,
    k: jax.Array,
    *,
    spec: NSASpec,
    implementation: dispatch.Implementation | None = None,
    interpret: bool = False,
    segment_ids: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
) -> BlockSet:
    """The blocks that `nsa_attention` selects for the same arguments; raises as it does."""
    start, pos = _places(q, k, segment_ids, q_offset, spec.block_size)
    how = _how(q, k, k, spec.block_size, implementation, interpret)
    mean_k = block_mean(_whole_blocks(k, spec.block_size), block=spec.block_size, **how)
    visible, scale = visible_blocks(start, pos, spec), q.shape[-1] ** -0.5
    _, lse = compressed_attention(q, mean_k, mean_k, visible, scale=scale, **how)
    return select(q, mean_k, lse, visible, pos, spec=spec, how=how)


def _how(q, k, v, block, implementation, interpret):
    """One choice of implementation for all branches, as keyword arguments of the operations."""
    name = dispatch.resolve(
        implementation,
        ("reference", "xla", "triton", "mosaic_tpu"),
        interpret=interpret,
        misfits=limits.selected_misfits(q, k, v, block),
    )
    return {"implementation": name, "interpret": interpret}


def visible_blocks(start, pos, spec):
    """i32[b s 2] half-open range of the complete blocks of a query's sequence before it."""
    return jnp.stack([start, pos + 1], axis=-1) // spec.block_size


def select(q, mean_k, lse, visible, pos, *, spec, how):
    """The blocks that the weights of the compressed branch rank highest."""
    rule = SelectRule(spec.block_count, spec.forced_first, spec.forced_local, spec.block_size)
    own = pos // spec.block_size  # -1 where pos is
    scale = q.shape[-1] ** -0.5
    blocks = select_blocks(q, mean_k, lse, visible, own, rule=rule, scale=scale, **how)
    return dataclasses.replace(blocks, bits=checkpoint_name(blocks.bits, BLOCKS))


def _places(q, k, segment_ids, q_offset, block):
    """i32[b s] index of the first key of each query's sequence, and of its own; -1 for padding."""
    sizes = dispatch.bind_attention(q=(q, "b s n h"), k=(k, "b t k h"))
    b, s, t = sizes["b"], sizes["s"], sizes["t"]
    _check_offset(q_offset, s, t)
    pos = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32) + q_offset, (b, s))
    if segment_ids is None:
        return jnp.zeros_like(pos), pos
    dispatch.bind_dims(k=(k, "b t k h"), segment_ids=(segment_ids, "b t"))
    _check_segments(segment_ids, block)
    return places_of_segments(segment_ids, q_offset, s)


def places_of_segments(segment_ids, q_offset, count):
    """As i32[b s] the sequence's first key and the own key of the `count` queries at `q_offset`.

    Both are indices of `segment_ids`; the own one is -1 at padding.
    """
    at = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    start = jax.lax.cummax(jnp.where(begins, at, 0), axis=1)
    pos = jnp.where(segment_ids >= 0, at, -1)
    return tuple(jax.lax.dynamic_slice_in_dim(x, q_offset, count, axis=1) for x in (start, pos))


def _whole_blocks(x, block):
    """Appends zeros up to a multiple of `block`; no query sees them."""
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
