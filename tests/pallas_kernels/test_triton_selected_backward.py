"""The gradients of the selected branch on GPUs, interpreted, against float64 loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels import BlockSet, selected_attention
from pallas_kernels.blocks import pack
from pallas_kernels.selected_attention import triton_backward
from tests import testing
from tests.pallas_kernels.chosen_blocks import causal, choice, inputs, loops, visible

INTERPRETED = {"implementation": "triton", "interpret": True}
NAMES = ("dq", "dk", "dv")


def _grads(arrays, members, pos, block, **settings):
    *qkv, dout = arrays
    blocks = BlockSet(pack(jnp.asarray(members)), block)
    op = functools.partial(selected_attention, scale=dout.shape[3] ** -0.5, **settings)

    @jax.jit
    def run(q, k, v, dout):
        return jax.vjp(lambda *x: op(*x, blocks, jnp.asarray(pos)), q, k, v)[1](dout)

    return run(*qkv, dout)


def _check(got, want, dtype="float32"):
    for name, x, y in zip(NAMES, got, want, strict=True):
        assert x.dtype == dtype
        # Twice as close as results have to be.
        testing.assert_close(name, x, y, dtype=dtype, factor=0.5)


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
    arrays = inputs(queries, keys, 2 * group, 2, width=width, rows=2, dtype=dtype)
    pos = causal(queries, keys, rows=2)
    members = choice(pos, 2, keys, block)
    seen = visible(members, pos, keys, block)
    got = _grads(arrays, members, pos, block, **INTERPRETED)
    _check(got, loops(arrays, seen)[1:], dtype)
    blind = ~np.repeat(seen.any(3), group, axis=2)
    unused = ~seen.any(1).swapaxes(1, 2)
    assert blind.any()
    assert unused.any()
    assert not np.asarray(got[0])[blind].any()
    assert not any(np.asarray(x)[unused].any() for x in got[1:])


@pytest.mark.parametrize("length", [1, 33, 130])
def test_any_length(length):
    arrays, pos = inputs(length, length, 7, 1), np.arange(length, dtype=np.int32)[None]
    members = choice(pos, 1, length, 32, density=0.5)
    got = _grads(arrays, members, pos, 32, **INTERPRETED)
    _check(got, loops(arrays, visible(members, pos, length, 32))[1:])


def _kernels(arrays, members, pos, block, **settings):
    """Runs the backward kernels on the results of the plain operation; `most` is known."""
    q, k, v, dout = arrays
    blocks = BlockSet(pack(jnp.asarray(members)), block, int(members.sum(3).max()))
    scale, seen = q.shape[3] ** -0.5, visible(members, pos, k.shape[1], block)
    group = q.shape[2] // k.shape[2]
    logits = jnp.einsum("bsnh,btnh->bsnt", q, jnp.repeat(k, group, axis=2)) * scale
    logits = jnp.where(np.repeat(seen, group, axis=2), logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    out = selected_attention(q, k, v, blocks, pos, scale=scale, implementation="reference")
    backward = functools.partial(triton_backward.backward, scale=scale, interpret=True, **settings)
    return functools.partial(jax.jit(backward), (q, k, v, blocks, pos, out, lse), dout)


def test_a_block_that_every_query_chooses_is_cut_into_segments():
    arrays, pos = inputs(90, 90, 2, 1), np.arange(90, dtype=np.int32)[None]
    members = choice(pos, 1, 90, 32, density=0.2)
    members[..., 0] = True
    want = loops(arrays, visible(members, pos, 90, 32))[1:]
    for segment in (20, 2048):
        _check(_kernels(arrays, members, pos, 32, segment=segment)(), want)


def test_two_runs_are_equal_to_the_bit():
    arrays, pos = inputs(40, 100, 7, 1, dtype="bfloat16"), causal(40, 100)
    members = choice(pos, 1, 100, 32)
    members[..., 0] = True
    run = _kernels(arrays, members, pos, 32, segment=16)
    for x, y in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(x, y)


def test_no_choice_has_no_gradient():
    arrays, pos = inputs(20, 64, 2, 1), causal(20, 64)
    got = _grads(arrays, np.zeros((1, 20, 1, 2), bool), pos, 32, **INTERPRETED)
    assert not any(np.asarray(x).any() for x in got)


def test_packed_sequences_equal_separate_ones():
    arrays = inputs(64, 64, 2, 1, rows=2)
    pos = np.tile(np.arange(64, dtype=np.int32), (2, 1))
    pos[0, 50:] = -1  # padding after the first sequence
    chosen = choice(pos, 1, 64, 32, density=0.6)
    separate = _grads(arrays, chosen, pos, 32, **INTERPRETED)
    packed_pos = pos.reshape(1, 128).copy()
    packed_pos[:, 64:] += 64
    members = np.zeros((1, 128, 1, 4), bool)
    members[0, :64, :, :2], members[0, 64:, :, 2:] = chosen
    one_row = tuple(x.reshape(1, 128, *x.shape[2:]) for x in arrays)
    packed = _grads(one_row, members, packed_pos, 32, **INTERPRETED)
    for x, y in zip(packed, separate, strict=True):
        testing.assert_close("packed", x, y.reshape(x.shape))


def test_nan_in_what_nobody_sees_changes_nothing():
    arrays, pos = inputs(70, 190, 4, 2), causal(70, 190)
    pos[:, 40:] = -1  # the last keys are then in the future of all
    members = choice(pos, 2, 190, 32, density=0.2)
    members[..., 1] = False
    members[:, :4] = False  # queries that see nothing though they could, or only chose the future
    members[:, :2, :, 5] = True
    seen = visible(members, pos, 190, 32)
    q, k, v, dout = arrays
    sees = np.repeat(seen.any(3), 2, axis=2)[..., None]
    used = seen.any(1).swapaxes(1, 2)[..., None]
    poisoned = tuple(
        jnp.where(keep, x, jnp.nan) for keep, x in ((sees, q), (used, k), (used, v), (sees, dout))
    )
    assert all(np.isnan(x).any() for x in poisoned)
    want = _grads(arrays, members, pos, 32, **INTERPRETED)
    for x, y in zip(_grads(poisoned, members, pos, 32, **INTERPRETED), want, strict=True):
        np.testing.assert_array_equal(x, y)


def test_an_infinite_gradient_stays_visible():
    *qkv, dout = inputs(40, 64, 2, 1)
    pos = np.arange(24, 64, dtype=np.int32)[None]
    members = np.ones((1, 40, 1, 2), bool)
    got = _grads((*qkv, dout.at[0, 3, 1, 0].set(jnp.inf)), members, pos, 32, **INTERPRETED)
    assert all(np.isnan(x).any() or np.isinf(x).any() for x in got)
    assert np.isfinite(np.asarray(got[0])[0, 4:]).all()


def test_works_under_checkpoint_scan_and_donation():
    q, k, v, dout = inputs(24, 64, 2, 1)
    pos = causal(24, 64)
    blocks = BlockSet(pack(jnp.asarray(choice(pos, 1, 64, 32, density=0.6))), 32)

    def loss(q, **how):
        def layer(x, _):
            return selected_attention(x, k, v, blocks, pos, scale=0.125, **how), None

        return (jax.lax.scan(jax.checkpoint(layer), q, length=2)[0] * dout).sum()

    want = jax.grad(functools.partial(loss, implementation="reference"))(q)
    grad = jax.grad(functools.partial(loss, **INTERPRETED))
    testing.assert_close("dq", jax.jit(grad, donate_argnums=0)(q), want)


def test_works_on_each_device_for_its_own_heads():
    *arrays, dout = inputs(24, 64, 4, 2)
    pos = causal(24, 64)
    bits = pack(jnp.asarray(choice(pos, 2, 64, 32, density=0.6)))

    def grads(q, k, v, dout, bits, pos, **how):
        op = functools.partial(selected_attention, scale=0.125, **how)
        return jax.vjp(lambda *x: op(*x, BlockSet(bits, 32), pos), q, k, v)[1](dout)

    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    heads = PartitionSpec(None, None, "heads")
    per_device = jax.shard_map(
        functools.partial(grads, **INTERPRETED),
        mesh=mesh,
        in_specs=(heads,) * 5 + (PartitionSpec(),),
        out_specs=heads,
        check_vma=False,
    )
    got = jax.jit(per_device)(*arrays, dout, bits, pos)
    want = grads(*arrays, dout, bits, pos, implementation="reference")
    for name, x, y in zip(NAMES, got, want, strict=True):
        testing.assert_close(name, x, y)


def test_memory_grows_with_the_length_and_not_its_square():
    def largest(tokens):
        def array(*shape, dtype="bfloat16"):
            return jax.ShapeDtypeStruct((1, tokens, *shape), dtype)

        def run(q, k, v, bits, pos, lse):
            blocks = BlockSet(bits, 64, most=16)
            residuals = q, k, v, blocks, pos, q, lse
            return triton_backward.backward(residuals, q, scale=0.125, interpret=True)

        keys, bits = array(1, 64), array(1, tokens // 2048, dtype="uint32")
        numbers = array(dtype="int32"), array(7, dtype="float32")
        return testing.largest_array(jax.make_jaxpr(run)(array(7, 64), keys, keys, bits, *numbers))

    assert largest(65536) <= 2 * largest(32768)
