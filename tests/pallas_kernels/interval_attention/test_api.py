"""Attention inside ranges: windows and frames of unequal length, padding, linear work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import interval_attention
from tests import testing
from tests.pallas_kernels.softmax_loops import softmax_loops

NAMES = ("out", "dq", "dk", "dv")


def _ranges(lengths, patches):
    """i32[1 p 2]: consecutive ranges, then padding that sees nothing."""
    ends = np.cumsum(lengths)
    ranges = np.repeat(np.stack([ends - lengths, ends], -1), lengths, axis=0)
    return np.concatenate([ranges, np.zeros((patches - len(ranges), 2), int)]).astype(np.int32)[
        None
    ]


def _inputs(patches, heads, kv_heads):
    rng = np.random.default_rng(patches)
    return tuple(
        jnp.asarray(rng.standard_normal((1, patches, n, 8)), jnp.float32)
        for n in (heads, kv_heads, kv_heads, heads)
    )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("lengths", "patches", "max_length"),
    [([1], 1, 1), ([64, 32, 64, 16, 7], 200, 64), ([300, 1, 299], 620, 300), ([700], 700, 700)],
)
def test_equals_float64_loops(implementation, lengths, patches, max_length):
    interval, arrays = _ranges(lengths, patches), _inputs(patches, 4, 2)
    padding = jnp.arange(patches)[:, None, None] >= sum(lengths)
    poisoned = [jnp.where(padding, jnp.nan, x) for x in arrays[:3]]

    @jax.jit
    def run(q, k, v, dout):
        op = functools.partial(
            interval_attention,
            interval=interval,
            max_length=max_length,
            implementation=implementation,
        )
        out, vjp = jax.vjp(op, q, k, v)
        return out, *vjp(dout)

    t = np.arange(patches)
    seen = (interval[..., :1] <= t) & (t < interval[..., 1:])
    want = softmax_loops(*arrays, seen)
    for name, ours, theirs in zip(NAMES, run(*poisoned, arrays[3]), want, strict=True):
        testing.assert_close(name, ours, theirs)


def test_no_array_holds_all_pairs():
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 16), jnp.float32)
    interval = _ranges([64] * 64, 4096)

    def loss(q, k, v):
        return interval_attention(
            q, k, v, interval=interval, max_length=64, implementation="xla"
        ).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(shape, shape, shape)
    assert testing.largest_array(jaxpr) < 4096 * 64


def test_max_length_must_be_positive():
    q, k, v, _ = _inputs(8, 2, 2)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        interval_attention(q, k, v, interval=_ranges([8], 8), max_length=0)
