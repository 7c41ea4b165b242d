"""Reference of `dense_attention`."""

from pallas_kernels.reference import masked_attention


def dense_attention(q, k, v, start, query_pos, key_pos, *, scale):
    """Softmax over the keys with 0 <= key_pos and start <= key_pos <= query_pos."""
    key = key_pos[:, None]
    see = (key >= 0) & (start[..., None] <= key) & (key <= query_pos[..., None])
    return masked_attention(q, k, v, see[:, None], scale=scale)[0]
