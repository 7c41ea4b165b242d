"""The kernels that select blocks: exactly the sets of the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import SelectRule, compressed_attention, select_blocks
from tests.pallas_kernels.devices import KERNELS, MARKS, kernels
from tests.pallas_kernels.simulated_tpu import simulated_tpu

BOTH = tuple(MARKS)
LOGITS = {
    "distinct": lambda rng, count: rng.permutation(count) / count,
    "few values": lambda rng, count: rng.integers(0, 3, count) / 4,
    "all equal": lambda rng, count: np.full(count, -0.25),
    "all zero": lambda rng, count: np.full(count, -300.0),  # exp underflows
}


@functools.cache
def _program(implementation, rule, scale):
    how = kernels(implementation)
    return jax.jit(functools.partial(select_blocks, rule=rule, scale=scale, **how))


def _assert_equal_to_reference(implementation, arrays, rule, scale=None):
    scale = arrays[0].shape[-1] ** -0.5 if scale is None else scale
    got, want = (_program(name, rule, scale)(*arrays) for name in (implementation, "reference"))
    assert got.most == rule.top_k
    np.testing.assert_array_equal(got.bits, want.bits)


def _inputs(queries, heads, kv_heads, *, block, width=64, rows=1, offset=0, dtype="float32"):
    """q, k, lse, visible, own of causal queries, of which one is padding."""
    rng = np.random.default_rng(queries + heads)
    count = -(-(queries + offset) // block)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q, k = normal(rows, queries, heads, width), normal(rows, count, kv_heads, width)
    pos = np.broadcast_to(np.arange(queries) + offset, (rows, queries)).copy()
    pos[:, queries // 2] = -1
    visible = jnp.asarray(np.stack([0 * pos, (pos + 1) // block], -1), jnp.int32)
    lse = compressed_attention(q, k, k, visible, scale=width**-0.5, implementation="reference")[1]
    return q, k, lse, visible, jnp.asarray(pos // block, jnp.int32)


@pytest.fixture(params=KERNELS)
def implementation(request):
    return request.param


@pytest.mark.parametrize(
    ("implementation", "group", "sizes"),
    [
        pytest.param(
            kernel,
            group,
            {"width": width, "block": block, "dtype": dtype},
            marks=MARKS[kernel],
        )
        for group, width, block, dtype, names in (
            (1, 64, 32, "float32", BOTH),
            (2, 128, 32, "float32", ["triton"]),
            (4, 64, 64, "bfloat16", BOTH),
            (7, 128, 64, "float32", BOTH),
            (8, 64, 32, "float16", ["triton"]),
            (16, 64, 32, "float32", BOTH),
        )
        for kernel in names
    ],
)
def test_chooses_as_the_reference(implementation, group, sizes):
    arrays = _inputs(140, 2 * group, 2, offset=1500, **sizes)
    rule = SelectRule(6, 1, 2, sizes["block"])
    _assert_equal_to_reference(implementation, arrays, rule)


@pytest.mark.parametrize("queries", [1, 33, 257])
def test_any_length(implementation, queries):
    arrays = _inputs(queries, 4, 2, block=32)
    _assert_equal_to_reference(implementation, arrays, SelectRule(3, 0, 1, 32))


def test_zero_queries_choose_the_lowest_blocks(implementation):
    q, *rest = _inputs(300, 7, 1, block=32)
    q, k, _, visible, own = jnp.zeros_like(q), *rest
    lse = jnp.log(jnp.maximum(visible[..., 1:] - visible[..., :1], 0.0)) * jnp.ones((1, 1, 7))
    arrays = q, k, lse, visible, own
    _assert_equal_to_reference(implementation, arrays, SelectRule(4, 0, 1, 32))


def test_nan_in_what_nobody_sees_changes_nothing(implementation):
    q, k, lse, visible, own = _inputs(300, 4, 2, block=32)
    poisoned = jnp.where((own >= 0)[..., None, None], q, jnp.nan), k.at[:, 9].set(jnp.nan)
    run = _program(implementation, SelectRule(4, 0, 1, 32), 0.1)
    clean = run(q, k, lse, visible, own)
    np.testing.assert_array_equal(run(*poisoned, lse, visible, own).bits, clean.bits)


def _places(rng, queries, count):
    """visible, own of sequences that start anywhere; one without any; `own` may have no score."""
    own = np.sort(rng.integers(count // 2, count, (1, queries)))
    own[:, [0, 1, -1]] = -1, count // 2, count - 1
    first = rng.integers(0, count, own.shape) % np.maximum(own, 1)
    first[:, queries // 2 :] = count // 2  # a later sequence
    last = np.where(own < 0, 0, own + rng.integers(0, 2, own.shape))
    return np.stack([first, last], -1).astype(np.int32), own.astype(np.int32)


@pytest.mark.parametrize("rule", [SelectRule(7, 0, 0, 64), SelectRule(700, 2, 2, 64)])
def test_given_scores_choose_what_top_k_does(implementation, rule):
    rng, queries, count = np.random.default_rng(rule.top_k), 140, 600
    q = jnp.zeros((1, queries, len(LOGITS), 64)).at[..., 0].set(1)
    logits = np.stack([make(rng, count) for make in LOGITS.values()], 1)  # one as each KV head's
    k = jnp.zeros((1, count, len(LOGITS), 64)).at[0, ..., 0].set(logits)
    lse = jnp.zeros(q.shape[:3])
    arrays = q, k, lse, *_places(rng, queries, count)
    _assert_equal_to_reference(implementation, arrays, rule, scale=1.0)


def test_the_tpu_kernel_has_no_races(capfd):
    arrays = _inputs(130, 1, 1, block=32, width=128, offset=9000)
    rule, scale = SelectRule(6, 1, 2, 32), 128**-0.5
    how = {"implementation": "mosaic_tpu", "interpret": True}
    want = _program("reference", rule, scale)(*arrays).bits
    with simulated_tpu(capfd):
        got = select_blocks(*arrays, rule=rule, scale=scale, **how).bits
        np.testing.assert_array_equal(got, want)
