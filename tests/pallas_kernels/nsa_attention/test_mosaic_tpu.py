"""Native sparse attention by the TPU kernels: all branches, against float64 loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import NSASpec, nsa_attention, nsa_blocks
from tests import testing
from tests.pallas_kernels.devices import kernels
from tests.pallas_kernels.nsa_loops import nsa_loops

SPEC = NSASpec(block_size=32, block_count=3, window_size=40, forced_first=1)
EVERY_BLOCK = NSASpec(block_size=32, block_count=5, window_size=20)  # no choice that could differ
pytestmark = pytest.mark.tpu
KERNELS = kernels("mosaic_tpu")
NAMES = ("out", "dq", "dk", "dv", "dgates")
TOKENS = 130
V5P = AbstractDevice(device_kind="TPU v5p", num_cores=2, platform="tpu")


def _inputs(heads=4, kv_heads=2, *, rows=1, width=64, dtype="float32"):
    """q, k, v, gates, dout."""
    rng = np.random.default_rng(heads)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal((rows, TOKENS, *shape)), dtype)

    q, k, v = 2 * normal(heads, width), normal(kv_heads, width), normal(kv_heads, width)
    return q, k, v, jax.nn.sigmoid(normal(heads, 3)), normal(heads, width)


@functools.cache
def _program(spec):
    """jit of q, k, v, gates, dout and segments -> out, dq, dk, dv, dgates."""

    @jax.jit
    def run(*arrays):
        *inputs, dout, segment_ids = arrays
        op = functools.partial(nsa_attention, spec=spec, segment_ids=segment_ids, **KERNELS)
        out, pull = jax.vjp(op, *inputs)
        return out, *pull(dout)

    return run


def _run(arrays, *, spec=SPEC, segment_ids=None):
    ids = np.zeros(arrays[0].shape[:2], np.int32) if segment_ids is None else segment_ids
    return _program(spec)(*arrays, ids)


def _loops(arrays, spec=SPEC):
    out, grads, _ = nsa_loops(*(np.asarray(x).astype(np.float64) for x in arrays), spec=spec)
    return out, *grads


def _check(got, want, **tolerance):
    for name, x, y in zip(NAMES, got, want, strict=True):
        testing.assert_close(name, x, y, **tolerance)


def test_equals_float64_loops():
    arrays = _inputs()
    _check(_run(arrays), _loops(arrays))


def test_bfloat16_is_near_float64_on_the_same_rounded_inputs():
    arrays = _inputs(7, 1, width=128, dtype="bfloat16")
    got = _run(arrays, spec=EVERY_BLOCK)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    _check(got, _loops(arrays, EVERY_BLOCK), dtype="bfloat16", factor=0.5)


def test_packed_segments_equal_separate_ones_whatever_lies_between():
    arrays = _inputs()
    ids = np.repeat([[0, -1, 1, -1, 2]], [40, 24, 17, 15, 34], axis=1).astype(np.int32)
    padding = jnp.asarray(ids < 0)[..., None, None]
    got = _run([jnp.where(padding, jnp.nan, x) for x in arrays], segment_ids=ids)
    assert not any(np.asarray(x)[ids < 0].any() for x in got)
    for number in range(3):
        part = ids[0] == number
        _check([x[:, part] for x in got], _loops([x[:, part] for x in arrays]))


def test_a_later_token_never_changes_an_earlier_output():
    q, k, v, gates, dout = _inputs()
    before = _run((q, k, v, gates, dout))[0]
    for token in (0, 31, 64, 100):
        q_, k_, v_ = (x.at[:, token].add(3) for x in (q, k, v))
        after = _run((q_, k_, v_, gates, dout))[0]
        np.testing.assert_array_equal(before[:, :token], after[:, :token])
        assert (before[:, token] != after[:, token]).all()


def test_the_result_is_the_same_bits_whatever_was_computed_before():
    """The rows of a batch swapped: programs run in another order, over other memory."""
    arrays = _inputs(rows=2)
    one, swapped = (jax.tree.leaves(_run(x)) for x in (arrays, [x[::-1] for x in arrays]))
    for x, y in zip(one, swapped, strict=True):
        np.testing.assert_array_equal(x, y[::-1])


def test_offset_queries_equal_the_tail_of_all_queries():
    q, k, v, gates, dout = _inputs()
    whole = _run((q, k, v, gates, dout))[0]
    run = functools.partial(nsa_attention, spec=SPEC, **KERNELS)
    tail = jax.jit(lambda offset: run(q[:, 97:], k, v, gates[:, 97:], q_offset=offset))
    testing.assert_close("tail", tail(jnp.int32(97)), whole[:, 97:])


def test_blocks_are_those_of_the_reference():
    q, k, *_ = _inputs()
    run = functools.partial(nsa_blocks, spec=SPEC)
    got = jax.jit(functools.partial(run, **KERNELS))(q, k)
    want = jax.jit(functools.partial(run, implementation="reference"))(q, k)
    np.testing.assert_array_equal(got.bits, want.bits)


def _trace(*, tokens=TOKENS, width=64, heads=2, dtype="float32", spec=SPEC, **how):
    shapes = ((heads, width), (1, width), (1, width), (heads, 3))
    arrays = [jax.ShapeDtypeStruct((1, tokens, *x), dtype) for x in shapes]
    return jax.make_jaxpr(functools.partial(nsa_attention, spec=spec, **how))(*arrays)


def test_a_tpu_runs_the_kernels_unless_told_otherwise():
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=V5P)):
        by_itself, portable = str(_trace()), str(_trace(implementation="xla"))
        unfit = str(_trace(dtype="float16"))
    for kernel in ("select_blocks", "selected_attention_fwd", "window_attention_fwd"):
        assert f"name={kernel}" in by_itself
    assert "pallas_call" not in portable
    assert "pallas_call" not in unfit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 16}, r"head width 16 has no TPU kernel; use one of \(64, 128\) or .*'xla'"),
        ({"heads": 17}, "17 query heads per KV head have no TPU kernel; use at most 16 or"),
        ({"spec": NSASpec(block_size=16)}, "block size 16 has no TPU kernel; use one of"),
        ({"dtype": "float16"}, r"dtypes \['float16'\] of q, k, v have no TPU kernel; use one of"),
        ({"tokens": 2**20}, "over 3 devices by context parallelism, or use at most 425984 keys"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        _trace(**(KERNELS | settings))
