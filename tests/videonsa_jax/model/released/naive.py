"""The released attention layer written as plainly as it can be: numpy float64, token by token.

All tokens of one sequence in order. It shares nothing with the code under test but the top-k
network, which has test vectors of its own.
"""

import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp, softmax

from tests.videonsa_jax.model.naive_attention import dense
from videonsa_jax.model.released.topk import network_top

GROUP = 16


def layer(q, k, v, gates, vis, *, block, count, window):
    """q [L n h], k, v [L kv h], gates [L n 3], vis bool[L] -> attn [L n h], ids [L kv s]."""
    q, k, v, gates = (np.asarray(x, np.float64) for x in (q, k, v, gates))
    length, n, h = q.shape
    kv, scale = k.shape[1], h**-0.5
    slots = GROUP * kv
    copies = slots // n
    masked = [np.where(vis[:, None, None], x, 0) for x in (q, k, v)]
    padded = np.zeros((length, slots, h))
    padded[:, : copies * n] = np.tile(masked[0], (1, copies, 1))
    gates = np.where(vis[:, None, None], gates, 0.5)
    edges = np.arange(0, length, block)
    mean_k, mean_v = (np.stack([x[i : i + block].mean(0) for i in edges]) for x in masked[1:])

    out, lse = np.zeros((3, length, slots, h)), np.zeros((slots, length))
    for t in range(length):
        for slot in range(slots):
            head, begin = slot // GROUP, t // block
            logits = scale * mean_k[begin:, head] @ padded[t, slot]
            lse[slot, t] = logsumexp(logits)
            out[0, t, slot] = softmax(logits) @ mean_v[begin:, head]
            recent = slice(max(0, t + 1 - window), t + 1)
            weights = softmax(scale * masked[1][recent, head] @ padded[t, slot])
            out[2, t, slot] = weights @ masked[2][recent, head]

    scaling = lse.reshape(-1).reshape(length, slots)
    scores = np.zeros((length, kv, len(edges)))
    for t in range(length):
        for head in range(kv):
            group = slice(GROUP * head, GROUP * (head + 1))
            logits = scale * padded[t, group] @ mean_k[:, head].T - scaling[t, group, None]
            scores[t, head] = np.exp(logits).sum(0)
            scores[t, head, t // block] = GROUP
    own = np.repeat(np.arange(length)[:, None] // block, kv, axis=1)
    ids = np.asarray(network_top(jnp.asarray(scores, jnp.float32), jnp.asarray(own), count))
    for t in range(length):
        for slot in range(slots):
            head = slot // GROUP
            keys = np.flatnonzero(np.isin(np.arange(t + 1) // block, ids[t, head]))
            weights = softmax(scale * masked[1][keys, head] @ padded[t, slot])
            out[1, t, slot] = weights @ masked[2][keys, head]

    heads = [x[:, : copies * n].reshape(length, copies, n, h).mean(1) for x in out]
    sparse = sum(gates[..., i, None] * x for i, x in enumerate(heads))
    return sparse + dense(np.where(vis[:, None, None], 0, q), k, v), ids
