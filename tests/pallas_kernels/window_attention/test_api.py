"""The GPU kernel of the window branch: windows, segments, offsets, odd lengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import window_attention
from tests import testing
from tests.pallas_kernels.devices import kernels
from tests.pallas_kernels.softmax_loops import softmax_loops

SCALE = 0.2
pytestmark = pytest.mark.gpu
KERNELS = {"scale": SCALE, **kernels("triton")}


def _inputs(queries, keys, heads, kv_heads, *, width=64, dtype="float32"):
    rng = np.random.default_rng(queries + keys + heads)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return (
        normal(1, queries, heads, width),
        normal(1, keys, kv_heads, width),
        normal(1, keys, kv_heads, width),
    )


def _places(queries, offset=0):
    pos = jnp.arange(queries, dtype=jnp.int32)[None] + offset
    return jnp.zeros_like(pos), pos


def _want(arrays, start, pos, window):
    t = np.arange(arrays[1].shape[1])
    start, pos = (np.asarray(x)[..., None] for x in (start, pos))
    seen = (start <= t) & (pos - window < t) & (t <= pos)
    return softmax_loops(*arrays, np.zeros(arrays[0].shape), seen, SCALE)[0], seen


@pytest.mark.parametrize("window", [1, 64, 256])
@pytest.mark.parametrize("tokens", [1, 63, 65, 257])
def test_equals_float64_loops(tokens, window):
    arrays, places = _inputs(tokens, tokens, 4, 2), _places(tokens)
    got = jax.jit(functools.partial(window_attention, window=window, **KERNELS))(*arrays, *places)
    testing.assert_close("out", got, _want(arrays, *places, window)[0])


@pytest.mark.parametrize("group", [1, 2, 7, 8, 16])
def test_any_group(group):
    arrays, places = _inputs(70, 70, 2 * group, 2), _places(70)
    got = window_attention(*arrays, *places, window=20, **KERNELS)
    testing.assert_close("out", got, _want(arrays, *places, 20)[0])


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_equals_loops_over_the_rounded_inputs(width, dtype):
    arrays = _inputs(200, 200, 4, 2, width=width, dtype=dtype)
    places = _places(200)
    got = window_attention(*arrays, *places, window=100, **KERNELS)
    assert got.dtype == dtype
    want = _want(arrays, *places, 100)[0]
    testing.assert_close("out", got, want, dtype=dtype, factor=0.25)


@pytest.mark.parametrize(("queries", "offset"), [(100, 57), (1, 299), (3, 64)])
def test_queries_may_stand_anywhere(queries, offset):
    arrays, places = _inputs(queries, 300, 7, 1), _places(queries, offset)
    got = window_attention(*arrays, *places, window=70, **KERNELS)
    testing.assert_close("out", got, _want(arrays, *places, 70)[0])


def test_packed_segments_with_poison_between():
    # Segments at 0..39, 64..80 and 96..143; the padding between and behind holds NaN.
    tokens, window = 160, 30
    t = np.arange(tokens)
    begin = np.select([t < 40, t < 64, t < 81, t < 96, t < 144], [0, -1, 64, -1, 96], -1)
    real = jnp.asarray(begin >= 0)[None]
    pos = jnp.where(real, jnp.arange(tokens, dtype=jnp.int32), -1)
    start = jnp.asarray(np.maximum(begin, 0), jnp.int32)[None]
    arrays = _inputs(tokens, tokens, 4, 2)
    want, seen = _want(arrays, start, pos, window)
    poisoned = [jnp.where(real[..., None, None], x, jnp.nan) for x in arrays]
    got = window_attention(*poisoned, start, pos, window=window, **KERNELS)
    testing.assert_close("out", got, want)
    assert not np.asarray(got)[~seen.any(2)].any()


@pytest.mark.parametrize("token", [0, 31, 100])
def test_a_later_token_never_changes_an_earlier_output(token):
    (q, k, v), places = _inputs(150, 150, 2, 1), _places(150)
    run = jax.jit(functools.partial(window_attention, window=50, **KERNELS))
    before = run(q, k, v, *places)
    after = run(q, k.at[:, token].add(3), v.at[:, token].add(3), *places)
    np.testing.assert_array_equal(before[:, :token], after[:, :token])
    assert (before[:, token] != after[:, token]).all()
