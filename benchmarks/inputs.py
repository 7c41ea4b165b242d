"""The geometry of the benchmarks, and inputs whose selections are like a video's, or worse."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import NSASpec

HEADS, KV_HEADS, WIDTH = 28, 4, 128  # Qwen2.5-VL-7B
SPEC = NSASpec(block_size=64, block_count=32, window_size=256)
FRAME = 64  # tokens per frame pair: one block


def video_inputs(tokens, *, seed=0, dtype=jnp.float32):
    """q, k, v, gates, dout whose selections drift as those of a video do.

    Every frame has a content per KV head and an interest per query head. Both are random walks over
    frames: a step keeps 0.98 of the last value. A key is 0.7 content and 0.3 token noise by
    variance. A query, of standard deviation 2, is 0.1 its frame's content, 0.75 interest and 0.15
    token noise. So queries of one frame want nearly the same blocks, frames want gradually others,
    and recent blocks are only somewhat likelier than old ones.
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
    return _batched(rng, q, k, dtype)


def random_inputs(tokens, *, seed=0, dtype=jnp.float32):
    """The same arrays of independent normal values: queries share no more blocks than by chance."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((tokens, HEADS, WIDTH), np.float32)
    k = rng.standard_normal((tokens, KV_HEADS, WIDTH), np.float32)
    return _batched(rng, q, k, dtype)


def _batched(rng, q, k, dtype):
    """Adds v, dout and gates, and the axis of one row."""
    v, dout = (rng.standard_normal(x.shape, np.float32) for x in (k, q))
    gates = 1 / (1 + np.exp(-rng.standard_normal((*q.shape[:2], 3), np.float32)))
    return tuple(jnp.asarray(x[None], dtype) for x in (q, k, v, gates, dout))


INPUTS = {"video": video_inputs, "random": random_inputs}
