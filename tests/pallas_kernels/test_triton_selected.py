"""The GPU kernel of the selected branch, interpreted: any choice of blocks, and the fused sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockSet, selected_attention
from pallas_kernels.blocks import pack
from pallas_kernels.selected_attention import triton
from tests import testing
from tests.pallas_kernels.chosen_blocks import causal, choice, inputs, loops, visible

INTERPRETED = {"implementation": "triton", "interpret": True}


def _qkv(queries, keys, heads, kv_heads, **sizes):
    return inputs(queries, keys, heads, kv_heads, **sizes)[:3]


def _loops(arrays, seen):
    return loops((*arrays, arrays[0]), seen)[0]


def _run(arrays, members, pos, block, **settings):
    blocks = BlockSet(pack(jnp.asarray(members)), block)
    op = functools.partial(selected_attention, scale=arrays[0].shape[3] ** -0.5)
    return jax.jit(functools.partial(op, **settings))(*arrays, blocks, jnp.asarray(pos))


@pytest.mark.parametrize(
    ("group", "width", "block", "dtype"),
    [
        (1, 64, 32, "float32"),
        (2, 64, 64, "float32"),
        (4, 128, 32, "bfloat16"),
        (7, 128, 64, "float32"),
        (8, 64, 32, "float16"),
        (16, 64, 32, "float32"),
        (7, 128, 64, "bfloat16"),
    ],
)
def test_equals_float64_loops(group, width, block, dtype):
    queries, keys = 70, 200
    arrays = _qkv(queries, keys, 2 * group, 2, width=width, rows=2, dtype=dtype)
    pos = causal(queries, keys, rows=2)
    members = choice(pos, 2, keys, block)
    seen = visible(members, pos, keys, block)
    got = _run(arrays, members, pos, block, **INTERPRETED)
    assert got.dtype == dtype
    testing.assert_close("out", got, _loops(arrays, seen), dtype=dtype)
    nothing = np.repeat(~seen.any(3), group, axis=2)
    assert nothing.any()
    assert not np.asarray(got)[nothing].any()


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 257])
def test_any_length(length):
    arrays, pos = _qkv(length, length, 7, 1), np.arange(length, dtype=np.int32)[None]
    members = choice(pos, 1, length, 32, density=0.5)
    got = _run(arrays, members, pos, 32, **INTERPRETED)
    testing.assert_close("out", got, _loops(arrays, visible(members, pos, length, 32)))


def test_a_limit_past_the_keys_sees_all_keys():
    arrays, pos = _qkv(3, 40, 2, 1), np.full((1, 3), 1000, np.int32)
    members = np.ones((1, 3, 1, 2), bool)
    got = _run(arrays, members, pos, 32, **INTERPRETED)
    testing.assert_close("out", got, _loops(arrays, np.ones((1, 3, 1, 40), bool)))


def test_large_logits_stay_finite():
    q, *kv = _qkv(70, 200, 4, 2)
    pos = causal(70, 200)
    members = choice(pos, 2, 200, 32)
    got = _run((50 * q, *kv), members, pos, 32, **INTERPRETED)
    want = _run((50 * q, *kv), members, pos, 32, implementation="reference")
    testing.assert_close("out", got, want)


def _poisoned(arrays, seen, group):
    """NaN in queries that see nothing and in keys that nobody sees."""
    q, k, v = arrays
    q = jnp.where(np.repeat(seen.any(3), group, axis=2)[..., None], q, jnp.nan)
    used = seen.any(1).swapaxes(1, 2)[..., None]
    return q, *(jnp.where(used, x, jnp.nan) for x in (k, v))


def test_nan_in_what_nobody_sees_changes_nothing():
    arrays, pos = _qkv(70, 190, 4, 2), causal(70, 190)
    pos[:, 40:] = -1  # the last keys are then in the future of all
    members = choice(pos, 2, 190, 32, density=0.2)
    members[..., 1] = False
    seen = visible(members, pos, 190, 32)
    poisoned = _poisoned(arrays, seen, 2)
    assert all(np.isnan(x).any() for x in poisoned)
    np.testing.assert_array_equal(
        _run(poisoned, members, pos, 32, **INTERPRETED),
        _run(arrays, members, pos, 32, **INTERPRETED),
    )


def test_a_key_that_others_of_the_tile_do_not_see_changes_nothing():
    arrays, pos = _qkv(16, 128, 2, 1), np.arange(112, 128, dtype=np.int32)[None]
    members = np.zeros((1, 16, 1, 4), bool)
    members[:, :8, :, 0] = members[:, 8:, :, 1] = True
    q, k, v = arrays
    run = functools.partial(_run, members=members, pos=pos, block=32, **INTERPRETED)
    before, after = run(arrays), run((q, k.at[:, 40].add(9), v.at[:, 40].add(9)))
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert (before[:, 8:] != after[:, 8:]).any(-1).all()


def _gated(arrays, seen, dtype="float32"):
    """Gates and two branches; NaN for the queries that see nothing."""
    rng = np.random.default_rng(9)
    shapes = (*arrays[0].shape[:3], 3), arrays[0].shape, arrays[0].shape
    padding = (~seen.any((2, 3)))[..., None, None]
    return tuple(
        jnp.where(padding, jnp.nan, jnp.asarray(rng.standard_normal(x), dtype)) for x in shapes
    )


def _gated_sum(gated, selected):
    gates, compressed, window = (np.nan_to_num(np.asarray(x).astype(np.float64)) for x in gated)
    branches = compressed, np.asarray(selected, np.float64), window
    return sum(gates[..., i, None] * x for i, x in enumerate(branches))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fused_sum_equals_the_sum_of_branches(dtype):
    arrays = _qkv(70, 200, 14, 2, rows=2, dtype=dtype)
    pos = causal(70, 200, rows=2)
    members = choice(pos, 2, 200, 32)
    members[..., 0] = True
    seen = visible(members, pos, 200, 32)
    gated = _gated(arrays, seen, dtype)
    blocks = BlockSet(pack(jnp.asarray(members)), 32)
    run = functools.partial(triton.forward, scale=64**-0.5, interpret=True)
    got, _ = jax.jit(run)(*arrays, blocks, jnp.asarray(pos), gated)
    testing.assert_close("out", got, _gated_sum(gated, _loops(arrays, seen)), dtype=dtype)
    assert not np.asarray(got)[pos < 0].any()


def test_a_block_size_without_a_kernel_is_named():
    arrays, pos = _qkv(4, 32, 2, 1), causal(4, 32)
    with pytest.raises(ValueError, match=r"block size 16 .* use one of \(32, 64\) or .*'xla'"):
        _run(arrays, np.ones((1, 4, 1, 2), bool), pos, 16, **INTERPRETED)
