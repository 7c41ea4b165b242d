"""The gradients of native sparse attention by the GPU kernels, in float64 terms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import NSASpec, nsa_attention
from pallas_kernels.nsa_attention import triton_gate_grads
from tests import testing
from tests.pallas_kernels.devices import INTERPRET, kernels
from tests.pallas_kernels.nsa_loops import nsa_loops

pytestmark = pytest.mark.gpu
SPEC = NSASpec(block_size=32, block_count=3, window_size=40)
EVERY_BLOCK = NSASpec(block_size=32, block_count=5, window_size=20)  # no choice that could differ
NAMES = ("dq", "dk", "dv", "dgates")
TOKENS = 130


def _inputs(heads=4, kv_heads=2, *, rows=1, seed=0, dtype="float32"):
    """q, k, v, gates, dout."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal((rows, TOKENS, *shape)), dtype)

    q, k, v = 2 * normal(heads, 64), normal(kv_heads, 64), normal(kv_heads, 64)
    return q, k, v, jax.nn.sigmoid(normal(heads, 3)), normal(heads, 64)


@functools.cache
def _compiled(spec):
    op = functools.partial(nsa_attention, spec=spec, **kernels("triton"))

    @jax.jit
    def run(arrays, dout, segment_ids):
        out, pull = jax.vjp(functools.partial(op, segment_ids=segment_ids), *arrays)
        return out, pull(dout)

    return run


def _run(arrays, *, spec=SPEC, segment_ids=None):
    *arrays, dout = arrays
    return _compiled(spec)(arrays, dout, segment_ids)


def _float64(arrays):
    return [np.asarray(x).astype(np.float64) for x in arrays]


def _check(got, want, **tolerance):
    for name, x, y in zip(NAMES, got, want, strict=True):
        testing.assert_close(name, x, y, **tolerance)


@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 1), (4, 2)])
def test_equals_float64_loops(heads, kv_heads):
    arrays = _inputs(heads, kv_heads)
    out, grads = _run(arrays)
    want, wanted_grads, _ = nsa_loops(*arrays, spec=SPEC)
    testing.assert_close("out", out, want)
    _check(grads, wanted_grads)


def test_bfloat16_is_near_float64_on_the_same_rounded_inputs():
    arrays = _inputs(dtype="bfloat16")
    out, grads = _run(arrays, spec=EVERY_BLOCK)
    assert out.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.bfloat16 for x in grads)
    _check(grads, nsa_loops(*_float64(arrays), spec=EVERY_BLOCK)[1], dtype="bfloat16", factor=0.5)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_directional_derivative_of_the_float64_output(seed):
    arrays = _inputs(seed=seed)
    *inputs, dout = _float64(arrays)
    rng = np.random.default_rng(seed)
    direction = [rng.standard_normal(x.shape) for x in inputs]
    step = 1e-5

    def loss(sign):
        moved = [x + sign * step * d for x, d in zip(inputs, direction, strict=True)]
        out, _, chosen = nsa_loops(*moved, dout, spec=SPEC)
        return (out * dout).sum(), chosen

    (above, chosen), (below, chosen_below) = loss(1), loss(-1)
    assert chosen == chosen_below  # else the derivative does not exist
    grads = _float64(_run(arrays)[1])
    got = sum((x * d).sum() for x, d in zip(grads, direction, strict=True))
    length = np.sqrt(sum((x**2).sum() for x in grads))
    assert abs(got - (above - below) / (2 * step)) <= 5e-5 * length


def test_packed_segments_equal_separate_runs_whatever_lies_between():
    ids = np.repeat([[0, -1, 1, -1]], [40, 24, 50, 16], axis=1).astype(np.int32)
    padding = jnp.asarray(ids < 0)[..., None, None]
    arrays = _inputs()
    _, grads = _run([jnp.where(padding, jnp.nan, x) for x in arrays], segment_ids=ids)
    for part in (slice(0, 40), slice(64, 114)):
        want = nsa_loops(*(x[:, part] for x in arrays), spec=SPEC)[1]
        _check([x[:, part] for x in grads], want)
    assert not any(np.asarray(x)[ids < 0].any() for x in grads)


def test_gates_of_zero_and_one():
    q, k, v, gates, dout = _inputs()
    arrays = q, k, v, jnp.round(gates), dout
    _check(_run(arrays)[1], nsa_loops(*arrays, spec=SPEC)[1])


def test_an_infinite_gradient_stays_visible():
    *arrays, dout = _inputs()
    grads = _run((*arrays, dout.at[0, 70, 1, 0].set(jnp.inf)))[1]
    assert all(not np.isfinite(x).all() for x in grads)
    assert np.isfinite(np.asarray(grads[0])[0, 71:]).all()


def test_the_result_is_the_same_bits_whatever_was_computed_before():
    """The rows of a batch swapped: programs run in another order, over other memory."""
    arrays = _inputs(rows=2)
    one, swapped = (jax.tree.leaves(_run(x)) for x in (arrays, [x[::-1] for x in arrays]))
    for x, y in zip(one, swapped, strict=True):
        np.testing.assert_array_equal(x, y[::-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gate_gradients_read_nothing_of_queries_that_see_nothing(dtype):
    rng = np.random.default_rng(0)
    shape = (2, 23, 3, 64)
    dout, *branches = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4))
    pos = jnp.asarray(rng.integers(-1, 2, (2, 23)), jnp.int32)
    dead = (pos < 0)[..., None, None]
    poisoned = [jnp.where(dead, jnp.nan, x) for x in (dout, *branches)]
    got = triton_gate_grads.gate_gradients(poisoned[0], poisoned[1:], pos, interpret=INTERPRET)
    want = np.stack([(a * b).sum(-1) for a, b in ((_float64((dout, x))) for x in branches)], -1)
    testing.assert_close("dgates", got, np.where(dead, 0, want))
