"""Native sparse attention: three branches over the same keys, gated and summed."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.block_mean.ref import block_mean
from pallas_kernels.block_sizes.supported import Call
from pallas_kernels.block_sparse.block_set import BlockSet, ChosenKeys
from pallas_kernels.flash_attention.mask import KeyRangeMask
from pallas_kernels.nsa_attention import ref
from pallas_kernels.nsa_attention.branches import BranchConfigs, BranchMasks, choose
from pallas_kernels.nsa_attention.gating import combine
from pallas_kernels.nsa_attention.segments import token_positions, visible_blocks, whole_blocks
from pallas_kernels.nsa_attention.spec import NSASpec


def nsa_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: jax.Array,
    *,
    spec: NSASpec,
    implementation: str | None = None,
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
        of B; elsewhere its blocks would mix it with its neighbour, and inside of jit, where values
        cannot be checked, the results are then finite and wrong. To check a jitted program, call it
        once under `jax.disable_jit()`. None: one sequence per row.
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
    start, pos = token_positions(q, k, segment_ids, q_offset, spec.block_size)
    if implementation == dispatch.REFERENCE:
        return ref.nsa_attention(q, k, v, gates, start, pos, spec=spec)
    backend = _resolve(q, k, v, spec.block_size, implementation, interpret)
    configs = BranchConfigs.of(spec, q.shape[-1] ** -0.5, interpret)

    k, v = (whole_blocks(x, spec.block_size) for x in (k, v))
    means = tuple(block_mean(x, block=spec.block_size) for x in (k, v))
    visible = visible_blocks(start, pos, spec.block_size)
    ranges = KeyRangeMask.of_ranges(visible)
    compressed = backend.flash.attend(q, *means, ranges, configs.compressed)
    blocks = choose(
        q, means[0], compressed[1], visible, pos, spec=spec, backend=backend, config=configs.select
    )
    near = KeyRangeMask.of_window(start, pos, spec.window_size)
    masks = BranchMasks(ranges, ChosenKeys(blocks, pos), near)
    if backend.fused_nsa is not None:
        compressed = jax.lax.stop_gradient(compressed)
        return backend.fused_nsa(q, k, v, means, gates, compressed, masks, configs)
    selected, _ = backend.selected.attend(q, k, v, masks.selected, configs.selected)
    window, _ = backend.flash.attend(q, k, v, masks.window, configs.window)
    return combine(gates, (compressed[0], selected, window), pos)


def nsa_blocks(
    q: jax.Array,
    k: jax.Array,
    *,
    spec: NSASpec,
    implementation: str | None = None,
    interpret: bool = False,
    segment_ids: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
) -> BlockSet:
    """The blocks that `nsa_attention` selects for the same arguments; raises as it does."""
    start, pos = token_positions(q, k, segment_ids, q_offset, spec.block_size)
    if implementation == dispatch.REFERENCE:
        return ref.nsa_blocks(q, k, start, pos, spec=spec)
    backend = _resolve(q, k, k, spec.block_size, implementation, interpret)
    configs = BranchConfigs.of(spec, q.shape[-1] ** -0.5, interpret)
    mean_k = block_mean(whole_blocks(k, spec.block_size), block=spec.block_size)
    visible = visible_blocks(start, pos, spec.block_size)
    ranges = KeyRangeMask.of_ranges(visible)
    _, lse = backend.flash.attend(q, mean_k, mean_k, ranges, configs.compressed)
    return choose(q, mean_k, lse, visible, pos, spec=spec, backend=backend, config=configs.select)


def _resolve(q, k, v, block, implementation, interpret):
    """One backend for all branches."""
    keys = k.shape[1]
    call = Call.of(
        "nsa_attention", q, k, v, block=block, chosen_from=keys, ranked=-(-keys // block)
    )
    return dispatch.resolve(implementation, call, interpret=interpret)
