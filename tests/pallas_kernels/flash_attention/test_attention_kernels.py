"""What the kernels of attention over ranges promise on every platform.

Output and gradients against float64 loops. Cases of the same sizes share a compiled program.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    compressed_attention,
    dense_attention,
    interval_attention,
    window_attention,
)
from pallas_kernels.block_sizes import tpu
from tests import testing
from tests.pallas_kernels.devices import KERNELS, kernels, two_devices
from tests.pallas_kernels.simulated_tpu import simulated_tpu
from tests.pallas_kernels.softmax_loops import softmax_loops

SCALE, WINDOW = 0.2, 40


def _compressed(q, k, v, lo, hi, **how):
    return compressed_attention(q, k, v, jnp.stack([lo, hi], -1), scale=SCALE, **how)[0]


def _window(q, k, v, start, pos, **how):
    return window_attention(q, k, v, start, pos, window=WINDOW, scale=SCALE, **how)


def _interval(q, k, v, lo, hi, **how):
    ranges = jnp.stack([lo, hi], -1)
    return interval_attention(q, k, v, interval=ranges, max_length=90, scale=SCALE, **how)


def _dense(q, k, v, start, query_pos, key_pos, **how):
    places = {"start": start, "query_pos": query_pos, "key_pos": key_pos}
    return dense_attention(q, k, v, **places, scale=SCALE, **how)


@functools.cache
def _program(op, implementation):
    """jit of q, k, v, dout, *places -> out, dq, dk, dv."""
    how = kernels(implementation)

    def run(q, k, v, dout, *places):
        out, vjp = jax.vjp(lambda q, k, v: op(q, k, v, *places, **how), q, k, v)
        return out, *vjp(dout)

    return jax.jit(run)


def _arrays(queries, keys, heads, kv_heads, *, rows=1, width=64, dtype="float32"):
    """q, k, v, dout."""
    rng = np.random.default_rng(queries + keys + heads)
    q, k = (rows, queries, heads, width), (rows, keys, kv_heads, width)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in (q, k, k, q))


def _between(lo, hi, keys):
    """bool[1 s t]: lo <= t < hi, for lo and hi [s]."""
    t = np.arange(keys)
    return ((lo[:, None] <= t) & (t < hi[:, None]))[None]


def _poisoned(arrays, seen):
    """NaN in every query that sees nothing, its dout, and in every key that nobody sees."""
    query, key = (jnp.asarray(seen.any(axis))[..., None, None] for axis in (2, 1))
    q, k, v, dout = arrays
    q, dout = (jnp.where(query, x, jnp.nan) for x in (q, dout))
    return q, *(jnp.where(key, x, jnp.nan) for x in (k, v)), dout


def _check(op, implementation, arrays, places, seen):
    """Compares with loops; what is not seen holds NaN for the kernels and must not matter."""
    places = [jnp.asarray(x, jnp.int32)[None] for x in places]
    got = _program(op, implementation)(*_poisoned(arrays, seen), *places)
    want = softmax_loops(*arrays, seen, SCALE)
    dtype = arrays[0].dtype.name
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert ours.dtype == dtype
        testing.assert_close(name, ours, theirs, dtype=dtype, factor=testing.RANGE_KERNELS[dtype])
        unseen = ~seen.any(2 if name in ("out", "dq") else 1)
        assert not np.asarray(ours)[unseen].any(), name


@pytest.fixture(params=KERNELS)
def implementation(request):
    return request.param


def _windows(case):
    """start, pos [300] of a case: a query at -1 is padding and sees nothing."""
    i = np.arange(300)
    if case == "offset":
        return 0 * i, i + 41
    if case == "packed":  # sequences at 0..99, 128..160 and 192..299
        begin = np.select([i < 100, i < 128, i < 161, i < 192], [0, -1, 128, -1], 192)
        return np.maximum(begin, 0), np.where(begin >= 0, i, -1)
    rng = np.random.default_rng(0)
    pos = rng.integers(-1, 350, 300)
    return rng.integers(0, 350, 300), pos


@pytest.mark.parametrize("case", ["offset", "packed", "any_order"])
def test_windows(implementation, case):
    start, pos = _windows(case)
    seen = _between(np.maximum(start, pos + 1 - WINDOW), pos + 1, 350)
    _check(_window, implementation, _arrays(300, 350, 4, 2), (start, pos), seen)


@pytest.mark.parametrize("case", ["before", "any_order"])
def test_block_means(implementation, case):
    # The released model looks ahead; some queries see nothing.
    lo, hi = np.zeros(300, int), np.arange(1, 301) // 2
    if case == "any_order":
        lo, hi = np.sort(np.random.default_rng(0).integers(0, 151, (2, 300)), axis=0)
        lo[5:90] = hi[5:90]
    _check(_compressed, implementation, _arrays(300, 150, 4, 2), (lo, hi), _between(lo, hi, 150))


@pytest.mark.parametrize(("queries", "group"), [(1, 3), (257, 7)])
def test_any_length_and_group(implementation, queries, group):
    lo, hi = np.zeros(queries, int), np.arange(queries) // 2 + 1
    arrays = _arrays(queries, queries, group, 1, width=128, dtype="bfloat16")
    _check(_compressed, implementation, arrays, (lo, hi), _between(lo, hi, queries))


@pytest.mark.tpu
def test_wider_tiles_of_a_tpu(monkeypatch):
    wide = tpu.pick("TPU v6 lite")
    monkeypatch.setattr(tpu, "pick", lambda _: wide)
    start, pos = _windows("packed")
    seen = _between(np.maximum(start, pos + 1 - WINDOW), pos + 1, 350)
    traced_anew = functools.partial(_window)
    _check(traced_anew, "mosaic_tpu", _arrays(300, 350, 2, 1), (start, pos), seen)


def test_ranges_of_the_vision_tower(implementation):
    lengths, patches = [64, 90, 1, 16, 7], 200
    ends = np.cumsum(lengths)
    hi = np.pad(np.repeat(ends, lengths), (0, patches - ends[-1]))
    lo = np.pad(np.repeat(ends - lengths, lengths), (0, patches - ends[-1]))
    arrays = _arrays(patches, patches, 2, 2, width=80)
    _check(_interval, implementation, arrays, (lo, hi), _between(lo, hi, patches))


@pytest.mark.parametrize("op", [_window, _dense])
def test_the_result_is_the_same_bits_whatever_was_computed_before(implementation, op):
    """The rows of a batch swapped: programs run in another order, over other memory."""
    places = np.zeros((2, 140)), np.stack([np.arange(140), np.arange(140) + 20])
    if op is _dense:
        places = *places, np.stack([np.random.default_rng(i).permutation(160) for i in range(2)])
    inputs = *_arrays(140, 160, 4, 2, rows=2), *(jnp.asarray(x, jnp.int32) for x in places)
    run = _program(op, implementation)
    swapped = run(*(x[::-1] for x in inputs))
    for name, x, y in zip(("out", "dq", "dk", "dv"), run(*inputs), swapped, strict=True):
        np.testing.assert_array_equal(x, y[::-1], err_msg=name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(implementation, value):
    q, k, v, dout = _arrays(300, 150, 4, 2)
    lo, hi = (jnp.asarray(x, jnp.int32)[None] for x in (np.zeros(300), np.arange(1, 301) // 2))
    dout = dout.at[0, 70, 1, 3].set(value)
    _, dq, dk, dv = _program(_compressed, implementation)(q, k, v, dout, lo, hi)
    assert not np.isfinite(dq[0, 70, 1]).any()
    assert np.isfinite(np.delete(dq, 70, axis=1)).all()
    assert not np.isfinite(dk[0, :35, 0]).any()
    assert not np.isfinite(dv[0, :35, 0, 3]).any()


@pytest.mark.tpu
def test_each_device_has_its_own_heads():
    q, k, v, dout = _arrays(140, 70, 2, 2)
    lo, hi = (jnp.asarray(x, jnp.int32)[None] for x in (np.zeros(140), np.arange(1, 141) // 2))
    run = _program(_compressed, "mosaic_tpu")
    heads, whole = jax.sharding.PartitionSpec(None, None, "heads"), jax.sharding.PartitionSpec()
    mesh = two_devices()
    specs = {"in_specs": (heads,) * 4 + (whole,) * 2, "out_specs": heads}
    got = jax.jit(jax.shard_map(run, mesh=mesh, **specs, check_vma=False))(q, k, v, dout, lo, hi)
    want = softmax_loops(q, k, v, dout, _between(*(np.asarray(x[0]) for x in (lo, hi)), 70), SCALE)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        testing.assert_close(name, ours, theirs, factor=testing.RANGE_KERNELS["float32"])


@pytest.mark.parametrize("op", [_window, pytest.param(_dense, marks=pytest.mark.slow)])
def test_tpu_kernels_have_no_races(op, monkeypatch, capfd):
    # Small tiles, so that more of them are visited than buffers exist.
    small = dataclasses.replace(tpu.pick("TPU v5p"), block_q=128, block_kv=128)
    monkeypatch.setattr(tpu, "pick", lambda _: small)
    queries, keys = 130, 140 if op is _window else 520
    arrays = _arrays(queries, keys, 1, 1, width=128)
    places = [np.zeros(queries), np.arange(queries) + keys - queries]
    if op is _dense:
        places.append(np.random.default_rng(0).permutation(keys))
    places = [jnp.asarray(x, jnp.int32)[None] for x in places]
    how = {"implementation": "mosaic_tpu", "interpret": True}
    with simulated_tpu(capfd):
        out, vjp = jax.vjp(lambda q, k, v: op(q, k, v, *places, **how), *arrays[:3])
        got = jax.block_until_ready((out, *vjp(arrays[3])))
    lo, pos, key_pos = (np.asarray(x[0]) for x in (*places, jnp.arange(keys)[None])[:3])
    lo = np.maximum(lo, pos + 1 - WINDOW) if op is _window else lo
    seen = ((lo[:, None] <= key_pos) & (key_pos <= pos[:, None]))[None]
    want = softmax_loops(*arrays, seen, SCALE)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        testing.assert_close(name, ours, theirs, factor=testing.RANGE_KERNELS["float32"])
