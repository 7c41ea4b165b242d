"""The GPU kernel of dense attention: any order of positions, any number of queries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dense_attention
from tests import testing
from tests.pallas_kernels.devices import kernels
from tests.pallas_kernels.softmax_loops import softmax_loops

pytestmark = pytest.mark.gpu
KERNELS = kernels("triton")


def _inputs(queries, keys, heads, kv_heads, *, rows=1, width=64, dtype="float32"):
    rng = np.random.default_rng(queries + keys + heads)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return (
        normal(rows, queries, heads, width),
        normal(rows, keys, kv_heads, width),
        normal(rows, keys, kv_heads, width),
    )


def _positions(queries, keys, *, rows=1):
    """Two sequences per row in shuffled order, with padding among queries and keys."""
    rng = np.random.default_rng(keys)
    key_pos = np.stack([rng.permutation(keys) for _ in range(rows)])
    query_pos = np.stack([rng.integers(keys, size=queries) for _ in range(rows)])
    start = np.where(query_pos < keys // 3, 0, keys // 3)
    key_pos[:, rng.permutation(keys)[: keys // 8]] = -1
    query_pos[:, 0] = -1
    return _places(start, query_pos, key_pos)


def _modality_major(vision, text):
    """Text of one row at the end of the keys, some of it before the vision tokens in sequence."""
    keys = vision + text
    before = text // 3
    text_pos = np.concatenate([np.arange(before), np.arange(before + vision, keys)])[None]
    key_pos = np.concatenate([np.arange(before, before + vision)[None], text_pos], axis=1)
    return _places(np.zeros_like(text_pos), text_pos, key_pos)


def _places(start, query_pos, key_pos):
    places = {"start": start, "query_pos": query_pos, "key_pos": key_pos}
    return {name: jnp.asarray(x, jnp.int32) for name, x in places.items()}


def _seen(start, query_pos, key_pos):
    key = np.asarray(key_pos)[:, None]
    low, high = (np.asarray(x)[..., None] for x in (start, query_pos))
    return (key >= 0) & (low <= key) & (key <= high)


def _loops(arrays, seen):
    return softmax_loops(*arrays, np.zeros(arrays[0].shape), seen)[0]


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads"),
    [(1, 1, 1, 1), (17, 63, 7, 1), (65, 64, 2, 2), (129, 257, 4, 1)],
)
def test_equals_float64_loops_in_any_order(queries, keys, heads, kv_heads):
    arrays, places = _inputs(queries, keys, heads, kv_heads), _positions(queries, keys)
    got = jax.jit(functools.partial(dense_attention, **KERNELS))(*arrays, **places)
    testing.assert_close("out", got, _loops(arrays, _seen(**places)))


@pytest.mark.parametrize(
    ("queries", "heads", "kv_heads"), [(1, 7, 1), (1, 16, 1), (3, 4, 2), (2, 28, 4)]
)
def test_few_queries_share_a_long_cache(queries, heads, kv_heads):
    # Programs share the keys of a tile; most of the cache is empty, and one query sees nothing.
    keys = 600
    arrays = _inputs(queries, keys, heads, kv_heads, rows=2)
    pos = np.arange(keys)
    key_pos = np.stack([np.where(pos < 521, pos, -1), np.where(pos < 70, pos, -1)])
    query_pos = np.stack([520 - np.arange(queries), np.full(queries, -1)])
    places = _places(np.zeros_like(query_pos), query_pos, key_pos)
    got = jax.jit(functools.partial(dense_attention, **KERNELS))(*arrays, **places)
    testing.assert_close("out", got, _loops(arrays, _seen(**places)))
    assert not np.asarray(got[1]).any()


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_equals_loops_over_the_rounded_inputs(width, dtype):
    arrays, places = _inputs(150, 200, 7, 1, width=width, dtype=dtype), _positions(150, 200)
    got = dense_attention(*arrays, **places, **KERNELS)
    assert got.dtype == dtype
    want = _loops(arrays, _seen(**places))
    # A quarter of what a model may differ by: one operation rounds its weights and its result.
    testing.assert_close("out", got, want, dtype=dtype, factor=0.25)


def test_text_sees_the_vision_tokens_before_it():
    places = _modality_major(vision=200, text=90)
    arrays = _inputs(90, 290, 4, 2)
    got = dense_attention(*arrays, **places, **KERNELS)
    testing.assert_close("out", got, _loops(arrays, _seen(**places)))


def test_large_logits_stay_finite():
    q, k, v = _inputs(65, 130, 4, 2)
    places = _positions(65, 130)
    got = dense_attention(40 * q, k, v, **places, **KERNELS)
    testing.assert_close("out", got, _loops((40 * q, k, v), _seen(**places)))


@pytest.mark.parametrize("queries", [130, 2])
def test_nan_in_what_nobody_sees_changes_nothing(queries):
    (q, k, v), places = _inputs(queries, 300, 4, 2), _positions(queries, 300)
    seen = _seen(**places)
    run = jax.jit(functools.partial(dense_attention, **KERNELS))
    clean = run(q, k, v, **places)
    q = jnp.where(seen.any(2)[..., None, None], q, jnp.nan)
    k, v = (jnp.where(seen.any(1)[..., None, None], x, jnp.nan) for x in (k, v))
    poisoned = run(q, k, v, **places)
    np.testing.assert_array_equal(poisoned, clean)
    assert not np.asarray(poisoned)[~seen.any(2)].any()


def test_nan_in_a_visible_key_is_not_hidden():
    (q, k, v), places = _inputs(20, 100, 2, 1), _positions(20, 100)
    seen = _seen(**places)
    key = int(np.flatnonzero(seen[0].any(0))[0])
    got = dense_attention(q, k, v.at[:, key].set(jnp.nan), **places, **KERNELS)
    assert np.isnan(np.asarray(got)[seen[:, :, key]]).all()


def test_no_array_holds_all_pairs():
    queries, keys = 8192, 16384
    arrays = [jax.ShapeDtypeStruct((1, x, 1, 64), jnp.bfloat16) for x in (queries, keys, keys)]
    places = [jax.ShapeDtypeStruct((1, x), jnp.int32) for x in (queries, queries, keys)]

    def run(q, k, v, start, query_pos, key_pos):
        places = {"start": start, "query_pos": query_pos, "key_pos": key_pos}
        return dense_attention(q, k, v, **places, **KERNELS)

    assert testing.largest_array(jax.make_jaxpr(run)(*arrays, *places)) < queries * keys // 32
