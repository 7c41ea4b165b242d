"""What the kernels of the selected branch promise on every platform.

Output and gradients against float64 loops. Cases of the same sizes share a compiled program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockSet, selected_attention
from pallas_kernels.block_sparse.block_set import pack
from tests import testing
from tests.pallas_kernels.chosen_blocks import causal, choice, inputs, loops, visible
from tests.pallas_kernels.devices import KERNELS, MARKS, kernels

BOTH = tuple(MARKS)
NAMES = ("out", "dq", "dk", "dv")


@functools.cache
def _program(implementation, block):
    """jit of q, k, v, dout, bits, pos -> out, dq, dk, dv."""
    how = kernels(implementation)

    def run(q, k, v, dout, bits, pos):
        op = functools.partial(selected_attention, scale=q.shape[3] ** -0.5, **how)
        out, vjp = jax.vjp(lambda *x: op(*x, BlockSet(bits, block), pos), q, k, v)
        return out, *vjp(dout)

    return jax.jit(run)


def _run(implementation, arrays, members, pos, block):
    return _program(implementation, block)(*arrays, pack(jnp.asarray(members)), pos)


def _poisoned(arrays, seen):
    """NaN in every query that sees nothing, its dout, and in every key that nobody sees."""
    q, k, v, dout = arrays
    sees = np.repeat(seen.any(3), q.shape[2] // k.shape[2], axis=2)[..., None]
    used = seen.any(1).swapaxes(1, 2)[..., None]
    q, dout = (jnp.where(sees, x, jnp.nan) for x in (q, dout))
    return q, *(jnp.where(used, x, jnp.nan) for x in (k, v)), dout


def _check(got, arrays, seen):
    """Against loops, twice as close as results have to be; exactly 0 where nothing is seen."""
    dtype = arrays[0].dtype.name
    blind = ~np.repeat(seen.any(3), arrays[0].shape[2] // arrays[1].shape[2], axis=2)
    unused = ~seen.any(1).swapaxes(1, 2)
    for name, ours, theirs in zip(NAMES, got, loops(arrays, seen), strict=True):
        assert ours.dtype == dtype
        testing.assert_close(name, ours, theirs, dtype=dtype, factor=testing.SELECTED_KERNELS)
        assert not np.asarray(ours)[blind if name in ("out", "dq") else unused].any(), name


def _case(group=2, *, width=64, block=32, dtype="float32"):
    """Any blocks for 70 queries of 200 keys: q, k, v, dout; members; pos; bool[b s k t] seen."""
    arrays = inputs(70, 200, 2 * group, 2, width=width, rows=2, dtype=dtype)
    pos = causal(70, 200, rows=2)
    pos[1, 40:] = -1  # the last keys are then in the future of all
    members = choice(pos, 2, 200, block)
    members[1, ..., 1] = False
    return arrays, members, pos, visible(members, pos, 200, block)


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
            (2, 64, 32, "float32", BOTH),
            (4, 128, 32, "bfloat16", ["triton"]),
            (7, 128, 64, "float32", BOTH),
            (8, 64, 32, "float16", ["triton"]),
            (16, 64, 32, "float32", BOTH),
            (7, 128, 64, "bfloat16", BOTH),
        )
        for kernel in names
    ],
)
def test_equals_float64_loops_whatever_nobody_sees(implementation, group, sizes):
    arrays, members, pos, seen = _case(group, **sizes)
    assert not seen.any(3).all()
    assert not seen.any(1).all()
    block = sizes["block"]
    got = _run(implementation, _poisoned(arrays, seen), members, pos, block)
    _check(got, arrays, seen)


@pytest.mark.parametrize("length", [1, 130])
def test_any_length(implementation, length):
    arrays, pos = inputs(length, length, 7, 1), np.arange(length, dtype=np.int32)[None]
    members = choice(pos, 1, length, 32, density=0.5)
    got = _run(implementation, arrays, members, pos, 32)
    _check(got, arrays, visible(members, pos, length, 32))


def test_a_limit_past_the_keys_sees_all_keys(implementation):
    arrays, members, pos, _ = _case()
    pos = np.where(pos < 0, pos, 1000).astype(np.int32)
    got = _run(implementation, arrays, members, pos, 32)
    _check(got, arrays, visible(members, pos, 200, 32))


def test_large_logits_stay_finite(implementation):
    (q, *rest), members, pos, seen = _case()
    out = _run(implementation, (50 * q, *rest), members, pos, 32)[0]
    testing.assert_close("out", out, loops((50 * q, *rest), seen)[0])


def test_the_result_is_the_same_bits_whatever_was_computed_before(implementation):
    """The rows of a batch swapped: programs run in another order, over other memory."""
    arrays, members, pos, _ = _case()
    one = _run(implementation, arrays, members, pos, 32)
    swapped = _run(implementation, [x[::-1] for x in arrays], members[::-1], pos[::-1], 32)
    for name, x, y in zip(NAMES, one, swapped, strict=True):
        np.testing.assert_array_equal(x, y[::-1], err_msg=name)


def test_no_choice_gives_nothing(implementation):
    arrays, members, pos, _ = _case()
    got = _run(implementation, arrays, np.zeros_like(members), pos, 32)
    assert not any(np.asarray(x).any() for x in got)


def test_an_infinite_gradient_stays_visible(implementation):
    (*qkv, dout), members, pos, seen = _case()
    row, query = np.argwhere(seen[:, :, 0].any(2))[10]
    dout = dout.at[row, query, 1, 0].set(jnp.inf)
    _, dq, dk, dv = _run(implementation, (*qkv, dout), members, pos, 32)
    assert not np.isfinite(dq[row, query, 1]).any()
    assert np.isfinite(np.delete(dq[row], query, axis=0)).all()
    key = np.flatnonzero(seen[row, query, 0])[0]
    assert not np.isfinite(dk[row, key, 0]).any()
    assert not np.isfinite(dv[row, key, 0, 0])


def test_a_key_that_others_of_the_tile_do_not_see_changes_nothing(implementation):
    (q, k, v, dout), members, pos, seen = _case()
    row, query = np.argwhere(seen[:, :, 0].any(2))[10]
    key = np.flatnonzero(seen[row, query, 0])[0]
    sees = seen[row, :, 0, key]
    moved = q, k.at[row, key, 0].add(9), v.at[row, key, 0].add(9), dout
    before = _run(implementation, (q, k, v, dout), members, pos, 32)[0][row, :, :2]
    after = _run(implementation, moved, members, pos, 32)[0][row, :, :2]
    np.testing.assert_array_equal(before[~sees], after[~sees])
    assert (before[sees] != after[sees]).any(-1).all()
