"""Native sparse attention and its gradients as float64 numpy loops over tokens: the last word."""

import numpy as np

NEAR_TIE = 3e-6  # relative gap of two scores below which float32 may choose the other block


def nsa_loops(q, k, v, gates, dout, *, spec, start=None):
    """Computes one token and KV head at a time; keys and queries are the same positions.

    Args:
      q: [b t n h]
      k: [b t k h]
      v: [b t k h]
      gates: [b t n 3]
      dout: [b t n h] gradient of the output.
      spec: an `NSASpec`.
      start: [b t] first key of each token's sequence, -1 for padding; None: 0.

    Returns:
      out, (dq, dk, dv, dgates), and the chosen blocks as {(row, token, KV head): set of blocks}.

    Raises:
      ValueError: two scores are so close that float32 may choose another block.
    """
    q, k, v, gates, dout = (np.asarray(x, np.float64) for x in (q, k, v, gates, dout))
    b, t, n, h = q.shape
    g, size = n // k.shape[2], spec.block_size
    start = np.zeros((b, t), int) if start is None else start
    out = np.zeros_like(q)
    dq, dk, dv, dgates = (np.zeros_like(x) for x in (q, k, v, gates))
    chosen = {}
    for row, pos, head in np.ndindex(b, t, k.shape[2]):
        if start[row, pos] < 0:
            continue
        heads = slice(head * g, (head + 1) * g)
        keys, values = k[row, :, head], v[row, :, head]
        first, own = start[row, pos] // size, pos // size
        complete = range(first, (pos + 1) // size)
        groups = [np.arange(j * size, (j + 1) * size) for j in complete]
        scores = _softmax(q[row, pos, heads] @ _means(keys, groups).T * h**-0.5).sum(0)
        blocks = _choose(dict(zip(complete, scores, strict=True)), first, own, spec)
        chosen[row, pos, head] = blocks
        selected = [
            u for j in sorted(blocks) for u in range(j * size, min((j + 1) * size, pos + 1))
        ]
        window = range(max(start[row, pos], pos - spec.window_size + 1), pos + 1)
        branches = groups, [[u] for u in selected], [[u] for u in window]
        for i, groups in enumerate(branches):
            gate = gates[row, pos, heads, i]
            o, grads = _branch(
                q[row, pos, heads], keys, values, groups, gate[:, None] * dout[row, pos, heads]
            )
            out[row, pos, heads] += gate[:, None] * o
            dgates[row, pos, heads, i] = (dout[row, pos, heads] * o).sum(-1)
            dq[row, pos, heads] += grads[0]
            for group, dkey, dvalue in zip(groups, grads[1], grads[2], strict=True):
                dk[row, group, head] += dkey / len(group)
                dv[row, group, head] += dvalue / len(group)
    return out, (dq, dk, dv, dgates), chosen


def _branch(q, keys, values, groups, do):
    """Attention of q [g h] over the means of groups of keys -> out, (dq, dkeys, dvalues)."""
    mean_k, mean_v = _means(keys, groups), _means(values, groups)
    scale = q.shape[1] ** -0.5
    weights = _softmax(q @ mean_k.T * scale)
    out = weights @ mean_v
    dweights = do @ mean_v.T
    dlogits = weights * (dweights - (weights * dweights).sum(1, keepdims=True)) * scale
    return out, (dlogits @ mean_k, dlogits.T @ q, weights.T @ do)


def _means(x, groups):
    return np.array([x[group].mean(0) for group in groups]).reshape(-1, x.shape[1])


def _softmax(logits):
    if not logits.size:
        return logits
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def _choose(scores, first, own, spec):
    forced = set(range(first, min(first + spec.forced_first, own + 1)))
    forced |= set(range(max(first, own - spec.forced_local + 1), own + 1))
    rest = sorted(set(range(first, own + 1)) - forced, key=lambda j: (-scores[j], j))
    free = spec.block_count - len(forced)
    if 0 < free < len(rest):
        low, high = scores[rest[free]], scores[rest[free - 1]]
        if 0 < high - low < NEAR_TIE * high:
            raise ValueError(
                f"near tie of blocks {rest[free - 1]} and {rest[free]}; change the seed"
            )
    return forced | set(rest[:free])
