"""The GPU kernel of the compressed branch: output and lse over ranges of means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compressed_attention
from tests import testing
from tests.pallas_kernels.devices import kernels
from tests.pallas_kernels.softmax_loops import softmax_loops

SCALE = 0.2
pytestmark = pytest.mark.gpu
KERNELS = {"scale": SCALE, **kernels("triton")}


def _inputs(queries, means, heads, kv_heads, *, width=64, dtype="float32"):
    rng = np.random.default_rng(queries + means + heads)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return (
        normal(1, queries, heads, width),
        normal(1, means, kv_heads, width),
        normal(1, means, kv_heads, width),
    )


def _causal(queries, block, offset=0):
    """i32[1 s 2]: the complete blocks before each query."""
    stop = (np.arange(queries) + offset + 1) // block
    return jnp.asarray(np.stack([0 * stop, stop], -1), jnp.int32)[None]


def _seen(visible, means):
    j = np.arange(means)
    visible = np.asarray(visible)
    return (visible[..., :1] <= j) & (j < visible[..., 1:])


def _assert_equal_to_loops(got, arrays, seen, *, dtype="float32", factor=1.0):
    """Compares the output, and lse by what it weighs: exp(logits - lse) must sum to one."""
    out, lse = got
    want = softmax_loops(*arrays, np.zeros(arrays[0].shape), seen, SCALE)[0]
    testing.assert_close("out", out, want, dtype=dtype, factor=factor)
    q, k = (np.asarray(x).astype(np.float64) for x in arrays[:2])
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    logits = np.einsum("bsnh,btnh->bsnt", q, k) * SCALE
    with np.errstate(divide="ignore"):
        want = np.log((np.exp(logits) * seen[:, :, None]).sum(-1))
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want))
    finite = np.isfinite(want)
    testing.assert_close("lse", np.asarray(lse)[finite], want[finite])
    assert not np.asarray(out)[~finite].any()


@pytest.mark.parametrize(("group", "block"), [(1, 1), (2, 3), (4, 8), (7, 3), (8, 1), (16, 8)])
def test_equals_float64_loops(group, block):
    queries = 140
    arrays = _inputs(queries, queries // block, group, 1)
    visible = _causal(queries, block)
    got = jax.jit(functools.partial(compressed_attention, **KERNELS))(*arrays, visible)
    _assert_equal_to_loops(got, arrays, _seen(visible, queries // block))


@pytest.mark.parametrize("queries", [1, 2, 63, 64, 65, 128, 257])
def test_any_length(queries):
    means = max(queries // 2, 1)
    arrays, visible = _inputs(queries, means, 2, 1), _causal(queries, 2)
    got = jax.jit(functools.partial(compressed_attention, **KERNELS))(*arrays, visible)
    _assert_equal_to_loops(got, arrays, _seen(visible, means))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_equals_loops_over_the_rounded_inputs(width, dtype):
    arrays = _inputs(200, 100, 4, 2, width=width, dtype=dtype)
    visible = _causal(200, 2)
    out, lse = compressed_attention(*arrays, visible, **KERNELS)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    _assert_equal_to_loops((out, lse), arrays, _seen(visible, 100), dtype=dtype, factor=0.25)


def test_ranges_need_neither_order_nor_overlap():
    # The released model looks ahead; packed rows start anew; some queries see nothing.
    rng = np.random.default_rng(0)
    ends = np.sort(rng.integers(0, 151, (1, 70, 2)), axis=-1)
    ends[:, 5:9] = 40
    visible = jnp.asarray(ends, jnp.int32)
    arrays = _inputs(70, 150, 4, 2)
    got = compressed_attention(*arrays, visible, **KERNELS)
    _assert_equal_to_loops(got, arrays, _seen(visible, 150))


def test_nan_in_what_nobody_sees_changes_nothing():
    q, k, v = _inputs(140, 70, 4, 2)
    visible = _causal(140, 2)
    visible = jnp.where((jnp.arange(140) >= 90)[None, :, None], visible.at[..., 0].set(52), visible)
    visible = visible.at[:, 30].set(0)
    seen = _seen(visible, 70)
    assert not seen.any(1).all()
    clean = compressed_attention(q, k, v, visible, **KERNELS)
    q = jnp.where(seen.any(2)[..., None, None], q, jnp.nan)
    k, v = (jnp.where(seen.any(1)[..., None, None], x, jnp.nan) for x in (k, v))
    poisoned = compressed_attention(q, k, v, visible, **KERNELS)
    for name, ours, theirs in zip(("out", "lse"), poisoned, clean, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_one_query_over_many_means():
    # Several programs share the means of one query; their results are merged.
    arrays = _inputs(1, 500, 7, 1)
    visible = _causal(1, 1, offset=481)
    got = compressed_attention(*arrays, visible, **KERNELS)
    _assert_equal_to_loops(got, arrays, _seen(visible, 500))
