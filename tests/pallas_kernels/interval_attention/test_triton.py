"""The GPU kernel of attention inside ranges: the vision tower's windows and frames."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import interval_attention
from tests import testing
from tests.pallas_kernels.devices import kernels
from tests.pallas_kernels.softmax_loops import softmax_loops

pytestmark = pytest.mark.gpu
KERNELS = kernels("triton")


def _ranges(lengths, patches):
    """i32[1 p 2]: consecutive ranges, then padding that sees nothing."""
    ends = np.cumsum(lengths)
    ranges = np.repeat(np.stack([ends - lengths, ends], -1), lengths, axis=0)
    padding = np.zeros((patches - len(ranges), 2), int)
    return jnp.asarray(np.concatenate([ranges, padding]), jnp.int32)[None]


def _inputs(patches, heads, *, width, dtype="float32"):
    rng = np.random.default_rng(patches)
    shape = (1, patches, heads, width)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(3))


def _want(arrays, interval):
    t = np.arange(arrays[0].shape[1])
    seen = (interval[..., :1] <= t) & (t < interval[..., 1:])
    return softmax_loops(*arrays, np.zeros(arrays[0].shape), np.asarray(seen))[0]


@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize(
    ("lengths", "patches", "max_length"),
    [([1], 1, 1), ([64, 32, 64, 16, 7], 200, 64), ([90, 1, 99], 190, 99)],
)
def test_equals_float64_loops(lengths, patches, max_length, width):
    interval, arrays = _ranges(lengths, patches), _inputs(patches, 2, width=width)
    padding = jnp.arange(patches)[:, None, None] >= sum(lengths)
    poisoned = [jnp.where(padding, jnp.nan, x) for x in arrays]
    got = interval_attention(*poisoned, interval=interval, max_length=max_length, **KERNELS)
    testing.assert_close("out", got, _want(arrays, interval))
    assert not np.asarray(got)[:, sum(lengths) :].any()


def test_half_precision_equals_loops_over_the_rounded_inputs():
    interval, arrays = _ranges([64, 64, 12], 140), _inputs(140, 2, width=80, dtype="bfloat16")
    got = interval_attention(*arrays, interval=interval, max_length=64, **KERNELS)
    assert got.dtype == jnp.bfloat16
    testing.assert_close("out", got, _want(arrays, interval), dtype="bfloat16", factor=0.25)
