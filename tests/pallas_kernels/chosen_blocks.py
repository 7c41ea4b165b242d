"""Inputs of selected attention, and what it computes, in float64 loops."""

import jax.numpy as jnp
import numpy as np

from tests.pallas_kernels.softmax_loops import softmax_loops


def inputs(queries, keys, heads, kv_heads, *, width=64, rows=1, dtype="float32"):
    """q, k, v and a gradient of the result."""
    rng = np.random.default_rng(queries + keys + heads)
    shapes = (queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)
    return tuple(jnp.asarray(rng.standard_normal((rows, *x, width)), dtype) for x in shapes)


def causal(queries, keys, *, rows=1):
    """i32[b s]: the last queries of the sequence, every eleventh one padding."""
    pos = np.broadcast_to(np.arange(keys - queries, keys), (rows, queries)).astype(np.int32).copy()
    pos[:, 5::11] = -1
    return pos


def choice(pos, kv_heads, keys, block, density=0.3):
    """bool[b s k c]: any blocks, before the query or after it; some queries choose none."""
    rng = np.random.default_rng(keys)
    shape = (*pos.shape, kv_heads, -(-keys // block))
    return (rng.random(shape) < density) & (rng.random((*pos.shape, 1, 1)) < 0.9)


def visible(members, pos, keys, block):
    """bool[b s k t]."""
    t = np.arange(keys)
    return members[..., t // block] & (t <= pos[..., None])[:, :, None]


def loops(arrays, see):
    """float64 out, dq, dk, dv of q, k, v and a gradient under bool[b s k t], by KV heads."""
    q, k, v, dout = (np.asarray(x).astype(np.float64) for x in arrays)
    group = q.shape[2] // k.shape[2]
    parts = []
    for head in range(k.shape[2]):
        heads = slice(head * group, (head + 1) * group)
        kv = (x[:, :, head : head + 1] for x in (k, v))
        parts.append(softmax_loops(q[:, :, heads], *kv, dout[:, :, heads], see[:, :, head]))
    return [np.concatenate(x, axis=2) for x in zip(*parts, strict=True)]
