"""Softmax attention under a mask and its gradients in float64 numpy, one query at a time."""

import numpy as np


def softmax_loops(q, k, v, dout, seen, scale=None):
    """[b s n h], [b t k h], [b t k h], [b s n h], bool[b s t] -> out, dq, dk, dv."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    group = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for row, s, head in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(seen[row, s])
        if not keys.size:
            continue
        here, where = (row, s, head), (row, keys, head // group)
        logits = k[where] @ q[here] * scale
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        out[here] = weights @ v[where]
        dlogits = weights * (v[where] @ dout[here] - dout[here] @ out[here]) * scale
        dq[here] = dlogits @ k[where]
        dk[where] += np.outer(dlogits, q[here])
        dv[where] += np.outer(weights, dout[here])
    return out, dq, dk, dv
