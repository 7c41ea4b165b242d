"""Reference of `nsa_attention`: the references of its parts, composed."""

from pallas_kernels.block_mean.ref import block_mean
from pallas_kernels.compressed_attention.ref import compressed_attention
from pallas_kernels.nsa_attention.branches import select_rule
from pallas_kernels.nsa_attention.gating import combine
from pallas_kernels.nsa_attention.segments import visible_blocks, whole_blocks
from pallas_kernels.select_blocks.ref import select_blocks
from pallas_kernels.selected_attention.ref import selected_attention
from pallas_kernels.window_attention.ref import window_attention


def nsa_attention(q, k, v, gates, start, pos, *, spec):
    """The gated sum of three branches, for queries of sequences at `start` that are at `pos`."""
    scale, size = q.shape[-1] ** -0.5, spec.block_size
    k, v = (whole_blocks(x, size) for x in (k, v))
    means = tuple(block_mean(x, block=size) for x in (k, v))
    visible = visible_blocks(start, pos, size)
    compressed, lse = compressed_attention(q, *means, visible, scale=scale)
    blocks = _select(q, means[0], lse, visible, pos, spec)
    selected = selected_attention(q, k, v, blocks, pos, scale=scale)
    window = window_attention(q, k, v, start, pos, window=spec.window_size, scale=scale)
    return combine(gates, (compressed, selected, window), pos)


def nsa_blocks(q, k, start, pos, *, spec):
    """The blocks that `nsa_attention` selects."""
    means = block_mean(whole_blocks(k, spec.block_size), block=spec.block_size)
    visible = visible_blocks(start, pos, spec.block_size)
    lse = compressed_attention(q, means, means, visible, scale=q.shape[-1] ** -0.5)[1]
    return _select(q, means, lse, visible, pos, spec)


def _select(q, mean_k, lse, visible, pos, spec):
    rule, own = select_rule(spec), pos // spec.block_size  # -1 where pos is
    return select_blocks(q, mean_k, lse, visible, own, rule=rule, scale=q.shape[-1] ** -0.5)
