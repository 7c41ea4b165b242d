"""Dense and the paper's attention written as plainly as they can be: numpy float64, token by token.

All tokens of one sequence in order, [t . h]; query head i reads KV head i // (n // k).
"""

import numpy as np
from scipy.special import softmax

from videonsa_jax.config.schema import NSAConfig
from videonsa_jax.model.gates import BRANCHES


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The last s of t tokens, q [s n h], attend to all t up to themselves, k and v [t k h]."""
    out, earlier = np.zeros_like(q), len(k) - len(q)
    for at in range(len(q)):
        seen = slice(0, earlier + at + 1)
        for head, kv in _heads(q, k):
            out[at, head], _ = _attend(q[at, head], k[seen, kv], v[seen, kv])
    return out


def paper(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    gates: np.ndarray,
    is_vision: np.ndarray,
    nsa: NSAConfig,
) -> np.ndarray:
    """Text attends densely; vision, bool[t], to vision through branches of gates [t n 3]."""
    out, gates = dense(q, k, v), gates[is_vision]
    vision = [x[is_vision] for x in (q, k, v)]
    for at, place in enumerate(np.flatnonzero(is_vision)):
        out[place] = _sparse(at, *vision, gates[at], nsa)
    return out


def _sparse(at, q, k, v, gates, nsa):
    """Vision query number `at` among vision tokens: q [r n h], k and v [r k h] -> [n h]."""
    size, own = nsa.block_size, at // nsa.block_size
    complete = (at + 1) // size
    out, importance = {}, np.zeros((k.shape[1], complete))
    for head, kv in _heads(q, k):
        past = slice(0, complete * size)
        means = [x[past, kv].reshape(complete, size, x.shape[-1]).mean(axis=1) for x in (k, v)]
        out[head, "cmp"], weights = _attend(q[at, head], *means)
        importance[kv] += weights
        window = slice(max(0, at + 1 - nsa.window_size), at + 1)
        out[head, "swa"], _ = _attend(q[at, head], k[window, kv], v[window, kv])
    for head, kv in _heads(q, k):
        ranked = [block for block in np.argsort(-importance[kv]) if block != own]
        chosen = [own, *ranked[: nsa.block_count - 1]]
        index = np.flatnonzero(np.isin(np.arange(at + 1) // size, chosen))
        out[head, "slc"], _ = _attend(q[at, head], k[index, kv], v[index, kv])
    return [
        sum(gates[head, i] * out[head, branch] for i, branch in enumerate(BRANCHES))
        for head, _ in _heads(q, k)
    ]


def _attend(query, keys, values):
    """[h], [t h], [t h] -> [h] and the weights [t]; zeros if there are no keys."""
    weights = softmax(keys @ query / np.sqrt(len(query))) if len(keys) else np.zeros(0)
    return weights @ values, weights


def _heads(q, k):
    """Each query head and the KV head that it reads."""
    group = q.shape[1] // k.shape[1]
    return [(head, head // group) for head in range(q.shape[1])]
