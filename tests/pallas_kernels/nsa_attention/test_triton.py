"""Native sparse attention by the GPU kernels, against float64 loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import NSASpec, dense_attention, nsa_attention, nsa_blocks
from tests import testing
from tests.pallas_kernels.devices import kernels
from tests.pallas_kernels.nsa_loops import nsa_loops

SPEC = NSASpec(block_size=32, block_count=3, window_size=40)
pytestmark = pytest.mark.gpu
KERNELS = kernels("triton")


def _inputs(tokens, heads, kv_heads, *, width=64, rows=1, seed=0, dtype="float32"):
    """q, k, v, gates, dout."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal((rows, tokens, *shape)), dtype)

    q, k, v = 2 * normal(heads, width), normal(kv_heads, width), normal(kv_heads, width)
    return q, k, v, jax.nn.sigmoid(normal(heads, 3)), normal(heads, width)


@functools.cache
def _compiled(spec, q_offset):
    def run(arrays, segment_ids):
        settings = {"segment_ids": segment_ids, "q_offset": q_offset}
        return nsa_attention(*arrays, spec=spec, **settings, **KERNELS)

    return jax.jit(run)


def _run(arrays, *, spec=SPEC, segment_ids=None, q_offset=0):
    return _compiled(spec, q_offset)(tuple(arrays), segment_ids)


def _loops(arrays, dout, *, spec=SPEC):
    arrays = [np.asarray(x).astype(np.float64) for x in (*arrays, dout)]
    return nsa_loops(*arrays, spec=spec)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width", "spec"),
    [
        (1, 7, 1, 64, SPEC),
        (31, 2, 2, 64, SPEC),
        (32, 4, 1, 64, NSASpec(block_size=32, block_count=1, window_size=1)),
        (65, 16, 1, 64, SPEC),
        (200, 4, 2, 128, NSASpec(64, 3, 256, forced_first=1, forced_local=2)),
        (257, 8, 1, 64, NSASpec(32, 4, 64, forced_first=1, forced_local=2)),
    ],
)
def test_equals_float64_loops(tokens, heads, kv_heads, width, spec):
    *arrays, dout = _inputs(tokens, heads, kv_heads, width=width, seed=tokens)
    want = _loops(arrays, dout, spec=spec)[0]
    testing.assert_close("out", _run(arrays, spec=spec), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float64_on_the_same_rounded_inputs(dtype):
    *arrays, dout = _inputs(130, 7, 1, dtype=dtype)
    spec = NSASpec(block_size=32, block_count=5, window_size=20)  # all blocks: no choice to differ
    got = _run(arrays, spec=spec)
    assert got.dtype == dtype
    testing.assert_close("out", got, _loops(arrays, dout, spec=spec)[0], dtype=dtype)


def test_blocks_are_those_of_the_reference():
    q, k, *_ = _inputs(300, 4, 2, seed=5)
    run = functools.partial(nsa_blocks, spec=SPEC)
    got = jax.jit(functools.partial(run, **KERNELS))(q, k)
    want = jax.jit(functools.partial(run, implementation="reference"))(q, k)
    np.testing.assert_array_equal(got.bits, want.bits)


@pytest.mark.parametrize("token", [0, 31, 64, 100])
def test_a_later_token_never_changes_an_earlier_output(token):
    q, k, v, gates, _ = _inputs(130, 4, 2)
    before = _run((q, k, v, gates))
    after = _run((q.at[:, token].add(3), k.at[:, token].add(3), v.at[:, token].add(3), gates))
    np.testing.assert_array_equal(before[:, :token], after[:, :token])
    assert (before[:, token] != after[:, token]).all()


def test_packed_segments_equal_separate_runs_whatever_lies_between():
    lengths, begins, total = (40, 17, 70), (0, 64, 96), 180
    *arrays, dout = _inputs(total, 4, 2, seed=1)
    ids = np.full((1, total), -1, np.int32)
    for i, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
        ids[:, begin : begin + length] = i
    padding = jnp.asarray(ids < 0)[..., None, None]
    out = _run([jnp.where(padding, jnp.nan, x) for x in arrays], segment_ids=ids)
    assert not np.asarray(out)[ids < 0].any()
    for begin, length in zip(begins, lengths, strict=True):
        part = slice(begin, begin + length)
        alone = _loops([x[:, part] for x in arrays], dout[:, part])[0]
        testing.assert_close(f"segment at {begin}", out[:, part], alone)


def test_offset_queries_equal_the_tail_of_all_queries():
    q, k, v, gates, _ = _inputs(200, 4, 2)
    whole = _run((q, k, v, gates))
    run = functools.partial(nsa_attention, spec=SPEC, **KERNELS)
    tail = jax.jit(lambda offset: run(q[:, 101:], k, v, gates[:, 101:], q_offset=offset))
    testing.assert_close("traced offset", tail(jnp.int32(101)), whole[:, 101:])
    one = _run((q[:, 150:151], k, v, gates[:, 150:151]), q_offset=150)
    testing.assert_close("one query", one, whole[:, 150:151])


def test_offset_queries_of_packed_segments():
    *arrays, dout = _inputs(180, 4, 2, seed=1)
    ids = np.repeat([[0, -1, 1, -1]], [70, 26, 60, 24], axis=1).astype(np.int32)
    q, k, v, gates = (jnp.where((ids < 0)[..., None, None], jnp.nan, x) for x in arrays)
    begin = 61  # a tile of queries holds the end of one segment, padding, and the next one
    got = _run((q[:, begin:], k, v, gates[:, begin:]), segment_ids=ids, q_offset=begin)
    for part in (slice(0, 70), slice(96, 156)):
        alone = _loops([x[:, part] for x in arrays], dout[:, part])[0]
        first = max(begin, part.start)
        here = slice(first - begin, part.stop - begin)
        testing.assert_close("segment", got[:, here], alone[:, first - part.start :])
    assert not np.asarray(got)[ids[:, begin:] < 0].any()


def test_rows_of_a_batch_are_independent():
    *arrays, _ = _inputs(65, 4, 2, rows=2)
    both = _run(arrays)
    np.testing.assert_array_equal(both[1:], _run([x[1:] for x in arrays]))
    np.testing.assert_array_equal(both, _run([x[::-1] for x in arrays])[::-1])


def test_zero_queries_choose_the_lowest_blocks():
    q, *rest, dout = _inputs(200, 4, 2)
    arrays = jnp.zeros_like(q), *rest
    out, _, chosen = _loops(arrays, dout)
    assert chosen[0, 199, 0] == {0, 1, 6}
    testing.assert_close("out", _run(arrays), out)


def test_large_logits_stay_finite():
    q, *rest, dout = _inputs(130, 4, 2)
    arrays = 40 * q, *rest
    testing.assert_close("out", _run(arrays), _loops(arrays, dout)[0])


def test_enough_blocks_make_the_selected_branch_dense():
    q, k, v, gates, _ = _inputs(130, 4, 2)
    only_selected = jnp.zeros_like(gates).at[..., 1].set(1)
    spec = NSASpec(block_size=32, block_count=9, window_size=1)
    pos = jnp.arange(130, dtype=jnp.int32)[None]
    places = {"start": 0 * pos, "query_pos": pos, "key_pos": pos}
    want = dense_attention(q, k, v, **places, implementation="reference")
    testing.assert_close("out", _run((q, k, v, only_selected), spec=spec), want)


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((2, 1, 16), {}, r"head width 16 has no Triton kernel; use one of \(64, 128\) or .*'xla'"),
        ((17, 1, 64), {}, "17 query heads per KV head have no Triton kernel; use at most 16 or"),
        (
            (2, 1, 64),
            {"spec": NSASpec(block_size=16)},
            r"block size 16 has no Triton kernel; use one of \(32, 64\) or .*'xla'",
        ),
    ],
)
def test_what_the_kernels_do_not_take_is_named(shape, settings, message):
    heads, kv_heads, width = shape
    q, k, v, gates, _ = _inputs(64, heads, kv_heads, width=width)
    with pytest.raises(ValueError, match=message):
        nsa_attention(q, k, v, gates, **({"spec": SPEC} | KERNELS | settings))
