"""Dense attention on TPUs: by splash attention, or by our kernel where that cannot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dense_attention
from pallas_kernels.flash_attention import mosaic_tpu
from pallas_kernels.flash_attention.mask import KeyRangeMask
from pallas_kernels.flash_attention.params import KernelConfig
from tests import testing
from tests.pallas_kernels.devices import INTERPRET, kernels
from tests.pallas_kernels.softmax_loops import softmax_loops

pytestmark = pytest.mark.tpu
SCALE = 0.2


@jax.jit
def _run(q, k, v, dout, start, query_pos, key_pos):
    """out, dq, dk, dv."""
    places = {"start": start, "query_pos": query_pos, "key_pos": key_pos}
    how = {"scale": SCALE, **kernels("mosaic_tpu")}
    out, vjp = jax.vjp(functools.partial(dense_attention, **places, **how), q, k, v)
    return out, *vjp(dout)


def _arrays(queries, keys, heads, kv_heads, *, rows=1, width=64, dtype="bfloat16"):
    rng = np.random.default_rng(queries + keys)
    q, k = (rows, queries, heads, width), (rows, keys, kv_heads, width)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in (q, k, k, q))


def _shuffled(queries, keys, rows):
    """Sequences at 0.. and at keys // 3.. in any order, with padding among queries and keys."""
    rng = np.random.default_rng(keys)
    key_pos = np.stack([rng.permutation(keys) for _ in range(rows)])
    query_pos = np.stack([rng.integers(keys, size=queries) for _ in range(rows)])
    start = np.where(query_pos < keys // 3, 0, keys // 3)
    key_pos[:, rng.permutation(keys)[: keys // 8]] = -1
    if queries > 1:
        query_pos[:, 0] = -1
        start[:, 1], query_pos[:, 1] = 50, 49  # sees nothing, so begins no sequence
    return start, query_pos, key_pos


def _modality_major(vision, text, rows):
    """Text of a row at the end of the keys, some of it before the vision tokens in sequence."""
    keys, before = vision + text, text // 3
    text_pos = np.concatenate([np.arange(before), np.arange(before + vision, keys)])
    key_pos = np.concatenate([np.arange(before, before + vision), text_pos])
    return np.zeros((rows, text)), np.tile(text_pos, (rows, 1)), np.tile(key_pos, (rows, 1))


def _check(arrays, places):
    """Compares with loops; what is not seen holds NaN for the kernels and must not matter."""
    start, query_pos, key_pos = (x[..., None] for x in places)
    key_pos = np.swapaxes(key_pos, 1, 2)
    seen = (key_pos >= 0) & (start <= key_pos) & (key_pos <= query_pos)
    mine = [jnp.asarray(seen.any(axis))[..., None, None] for axis in (2, 1)]
    q, k, v, dout = arrays
    q, dout = (jnp.where(mine[0], x, jnp.nan) for x in (q, dout))
    k, v = (jnp.where(mine[1], x, jnp.nan) for x in (k, v))
    got = _run(q, k, v, dout, *(jnp.asarray(x, jnp.int32) for x in places))
    want = softmax_loops(*arrays, seen, SCALE)
    dtype = arrays[0].dtype.name
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert ours.dtype == dtype
        testing.assert_close(name, ours, theirs, dtype=dtype, factor=testing.RANGE_KERNELS[dtype])
        unseen = ~seen.any(2 if name in ("out", "dq") else 1)
        assert not np.asarray(ours)[unseen].any(), name


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "rows", "dtype"),
    {
        "splash": (150, 290, 2, 1, 2, "bfloat16"),
        "splash_tiles": (700, 600, 1, 1, 1, "bfloat16"),
        "float32": (150, 290, 2, 1, 2, "float32"),
        "decode": (1, 290, 3, 1, 1, "bfloat16"),
    }.values(),
    ids=["splash", "splash_tiles", "float32", "decode"],
)
def test_positions_in_any_order(queries, keys, heads, kv_heads, rows, dtype):
    arrays = _arrays(queries, keys, heads, kv_heads, rows=rows, dtype=dtype)
    _check(arrays, _shuffled(queries, keys, rows))


def test_text_sees_the_vision_tokens_before_it():
    _check(_arrays(150, 290, 2, 1, rows=2), _modality_major(vision=140, text=150, rows=2))


def test_shards_of_the_keys_return_what_merges_them():
    q, k, v, _ = _arrays(70, 200, 2, 1, dtype="float32")
    start, query_pos, key_pos = (jnp.asarray(x, jnp.int32) for x in _shuffled(70, 200, 1))
    config = KernelConfig("dense_attention", SCALE, interpret=INTERPRET)
    run = jax.jit(functools.partial(mosaic_tpu.forward, config=config))
    whole, *shards = (
        run(q, k[:, at], v[:, at], KeyRangeMask.of_positions(start, query_pos, key_pos[:, at]))
        for at in (slice(None), slice(0, 100), slice(100, None))
    )
    lse = jnp.logaddexp(shards[0][1], shards[1][1])
    merged = sum(
        jnp.where(jnp.isneginf(lse), 0, jnp.exp(x - lse))[..., None] * out for out, x in shards
    )
    testing.assert_close("out", merged, whole[0])
    np.testing.assert_array_equal(jnp.isneginf(lse), jnp.isneginf(whole[1]))


def test_no_array_holds_all_pairs():
    queries, keys = 8192, 16384
    arrays = [jax.ShapeDtypeStruct((1, x, 1, 64), jnp.bfloat16) for x in (queries, keys, keys)]
    places = [jax.ShapeDtypeStruct((1, x), jnp.int32) for x in (queries, queries, keys)]
    traced = jax.make_jaxpr(_run)(*arrays, arrays[0], *places)
    assert testing.largest_array(traced) < queries * keys // 32
