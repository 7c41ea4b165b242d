"""Dense attention: any order of positions, empty rows, NaN in keys that nobody sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dense_attention
from tests import testing
from tests.pallas_kernels.softmax_loops import softmax_loops

NAMES = ("out", "dq", "dk", "dv")


def _inputs(queries, keys, heads, kv_heads, *, rows=2, width=16):
    rng = np.random.default_rng(queries + keys)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return (
        normal(rows, queries, heads, width),
        normal(rows, keys, kv_heads, width),
        normal(rows, keys, kv_heads, width),
        normal(rows, queries, heads, width),
    )


def _positions(queries, keys, *, rows=2, seed=0):
    """Two sequences per row in shuffled order, with padding among queries and keys."""
    rng = np.random.default_rng(seed)
    key_pos = np.stack([rng.permutation(keys) for _ in range(rows)])
    query_pos = np.stack([rng.permutation(keys)[:queries] for _ in range(rows)])
    start = np.where(query_pos < keys // 3, 0, keys // 3)
    key_pos[:, rng.permutation(keys)[: keys // 8]] = -1
    query_pos[:, 0] = -1
    return {
        "start": jnp.asarray(start, jnp.int32),
        "query_pos": jnp.asarray(query_pos, jnp.int32),
        "key_pos": jnp.asarray(key_pos, jnp.int32),
    }


def _seen(start, query_pos, key_pos):
    key = np.asarray(key_pos)[:, None]
    low, high = (np.asarray(x)[..., None] for x in (start, query_pos))
    return (key >= 0) & (low <= key) & (key <= high)


def _value_and_grads(arrays, **kwargs):
    @jax.jit
    def run(q, k, v, dout):
        out, vjp = jax.vjp(functools.partial(dense_attention, **kwargs), q, k, v)
        return out, *vjp(dout)

    return run(*arrays)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads"),
    [(1, 1, 4, 4), (17, 65, 7, 1), (130, 600, 4, 2), (1, 1100, 2, 2)],
)
def test_equals_float64_loops(implementation, queries, keys, heads, kv_heads):
    arrays, places = _inputs(queries, keys, heads, kv_heads), _positions(queries, keys)
    got = _value_and_grads(arrays, implementation=implementation, **places)
    want = softmax_loops(*arrays, _seen(**places))
    for name, ours, theirs in zip(NAMES, got, want, strict=True):
        testing.assert_close(name, ours, theirs)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_nan_in_what_nobody_sees_changes_nothing(implementation):
    arrays, places = _inputs(130, 600, 4, 2), _positions(130, 600)
    q, k, v, dout = arrays
    seen = _seen(**places)
    q = jnp.where(seen.any(2)[..., None, None], q, jnp.nan)
    k, v = (jnp.where(seen.any(1)[..., None, None], x, jnp.nan) for x in (k, v))
    clean = _value_and_grads(arrays, implementation=implementation, **places)
    poisoned = _value_and_grads((q, k, v, dout), implementation=implementation, **places)
    for name, ours, theirs in zip(NAMES, poisoned, clean, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_query_that_sees_nothing_returns_zero(implementation):
    arrays, places = _inputs(17, 65, 7, 1), _positions(17, 65)
    out = _value_and_grads(arrays, implementation=implementation, **places)[0]
    assert not np.asarray(out)[~_seen(**places).any(2)].any()


def test_no_array_holds_all_pairs():
    queries, keys = 4096, 8192
    arrays = [jax.ShapeDtypeStruct((1, x, 1, 16), jnp.float32) for x in (queries, keys, keys)]
    places = [jax.ShapeDtypeStruct((1, x), jnp.int32) for x in (queries, queries, keys)]

    def loss(q, k, v, start, query_pos, key_pos):
        return dense_attention(
            q, k, v, start=start, query_pos=query_pos, key_pos=key_pos, implementation="xla"
        ).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*arrays, *places)
    largest = testing.largest_array(jaxpr)
    assert largest < queries * keys // 32


def test_disagreeing_positions_are_named():
    q, k, v, _ = _inputs(17, 65, 7, 1)
    places = _positions(17, 65)
    with pytest.raises(
        ValueError, match=r"key_pos must be \[b t\] with t=65 of k, got .*\(2, 17\)"
    ):
        dense_attention(q, k, v, **(places | {"key_pos": places["query_pos"]}))
