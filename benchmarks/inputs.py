"""The geometry of the benchmarks, and inputs whose selections are like a video's, or worse.

Imports numpy only, so that a process without JAX makes the same inputs.
"""

import numpy as np

HEADS, KV_HEADS, WIDTH = 28, 4, 128  # Qwen2.5-VL-7B
BLOCK_SIZE, BLOCK_COUNT, WINDOW_SIZE = 64, 32, 256  # VideoNSA's
FRAME = 64  # tokens per frame pair: one block
TOWER_HEADS, TOWER_WIDTH = 16, 80  # of the vision tower, whose windows and frames hold patches
FRAME_PATCHES = 4 * FRAME


def video_inputs(tokens, *, seed=0):
    """q, k, v, gates, dout whose selections drift as those of a video do.

    Every frame has a content per KV head and an interest per query head. Both are random walks over
    frames: a step keeps 0.98 of the last value. A key is 0.7 content and 0.3 token noise by
    variance. A query, of standard deviation 2, is 0.1 its frame's content, 0.75 interest and 0.15
    token noise. So queries of one frame want nearly the same blocks, frames want gradually others,
    and recent blocks are only somewhat likelier than old ones.

    Returns:
      float32 arrays [1 t heads ...].
    """
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    frame = np.arange(tokens) // FRAME

    def walk(heads, keep=0.98):
        steps = normal(frame[-1] + 1, heads, WIDTH)
        for i in range(1, len(steps)):
            steps[i] = keep * steps[i - 1] + np.sqrt(1 - keep**2) * steps[i]
        return steps

    def mix(**parts):
        return sum(np.sqrt(np.float32(share)) * part for share, part in parts.values())

    content, interest = walk(KV_HEADS), walk(HEADS)
    k = mix(content=(0.7, content[frame]), noise=(0.3, normal(tokens, KV_HEADS, WIDTH)))
    q = 2 * mix(
        content=(0.1, np.repeat(content, HEADS // KV_HEADS, axis=1)[frame]),
        interest=(0.75, interest[frame]),
        noise=(0.15, normal(tokens, HEADS, WIDTH)),
    )
    return _with_others(rng, q, k)


def random_inputs(tokens, *, seed=0):
    """The same arrays of independent normal values: queries share no more blocks than by chance."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((tokens, HEADS, WIDTH), np.float32)
    k = rng.standard_normal((tokens, KV_HEADS, WIDTH), np.float32)
    return _with_others(rng, q, k)


def _with_others(rng, q, k):
    """Adds v, gates and dout, and the axis of one row."""
    v, dout = (rng.standard_normal(x.shape, np.float32) for x in (k, q))
    gates = 1 / (1 + np.exp(-rng.standard_normal((*q.shape[:2], 3), np.float32)))
    return tuple(x[None] for x in (q, k, v, gates, dout))


INPUTS = {"video": video_inputs, "random": random_inputs}
