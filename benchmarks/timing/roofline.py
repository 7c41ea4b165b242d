"""The least time an operation can take: its useful arithmetic and the bytes that it must move."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.inputs import BLOCK_SIZE, HEADS, WIDTH, WINDOW_SIZE
from benchmarks.timing.interleaved import seconds


@dataclasses.dataclass(frozen=True)
class Roof:
    """What this machine does at best.

    Attributes:
      flops: floating-point operations per second of one large matrix product.
      bandwidth: bytes per second read and written by a copy; None: not counted.
    """

    flops: float
    bandwidth: float | None = None

    def __str__(self):
        moved = f", {self.bandwidth / 1e9:.0f} GB/s" if self.bandwidth else ""
        return f"{self.flops / 1e9:.0f} GFLOP/s{moved}"

    def seconds(self, flops: float, moved: int) -> float:
        """The larger of the two times."""
        return max(flops / self.flops, moved / self.bandwidth if self.bandwidth else 0.0)


def cpu_roof(dtype) -> Roof:
    """A product in float32, whatever `dtype`; on few cores nothing here waits for memory first."""
    del dtype
    return Roof(_matmul_rate(2048, jnp.float32))


def gpu_roof(dtype) -> Roof:
    """A product in `dtype`, and a copy that no cache holds."""
    x = jnp.ones((1 << 30,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1).lower(x).compile()
    return Roof(_matmul_rate(8192, dtype), 2 * x.nbytes / _best(copy, (x,)))


def _matmul_rate(size, dtype):
    x = jnp.ones((size, size), dtype)
    return 2 * size**3 / _best(jax.jit(jnp.matmul).lower(x, x).compile(), (x, x))


def _best(program, arrays):
    return min(seconds(program, arrays) for _ in range(10))


def useful_flops(what: str, tokens: int, chosen: float) -> float:
    """Floating-point operations of the visible query-key pairs alone, forward.

    Args:
      what: an operation of `benchmarks.timing.programs`.
      tokens: queries, and keys; in decoding keys only.
      chosen: mean number of blocks that a query selects.
    """
    t = np.arange(tokens)
    pairs = {
        "compressed_attention": lambda: (t + 1) // BLOCK_SIZE,
        "select_blocks": lambda: (t + 1) // BLOCK_SIZE / 2,  # one product instead of two
        "selected_attention": lambda: t * 0 + chosen * BLOCK_SIZE - BLOCK_SIZE / 2,
        "window_attention": lambda: np.minimum(t + 1, WINDOW_SIZE),
    }
    branches = ("compressed_attention", "selected_attention", "window_attention")
    pairs["nsa"] = lambda: sum(pairs[branch]() for branch in branches)
    pairs["dense"] = pairs["dense triton"] = lambda: t + 1.0
    pairs["decode"] = pairs["decode cudnn"] = lambda: np.float64(tokens)
    pairs["block_mean"] = lambda: np.float64(0)
    return 4.0 * WIDTH * HEADS * float(np.sum(pairs[what]()))
