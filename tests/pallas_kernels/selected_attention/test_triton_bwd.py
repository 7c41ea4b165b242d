"""The gradients of the selected branch on GPUs, against float64 loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels import BlockSet, selected_attention
from pallas_kernels.block_sparse.block_set import ChosenKeys, pack
from pallas_kernels.flash_attention.params import KernelConfig
from pallas_kernels.selected_attention import triton_bwd
from tests import testing
from tests.pallas_kernels.chosen_blocks import causal, choice, inputs, loops, visible
from tests.pallas_kernels.devices import INTERPRET, kernels, two_devices

pytestmark = pytest.mark.gpu
KERNELS = kernels("triton")
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
        testing.assert_close(name, x, y, dtype=dtype, factor=testing.SELECTED_KERNELS)


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
    config = KernelConfig("selected_attention", scale, interpret=INTERPRET)
    backward = functools.partial(triton_bwd.backward, config=config, **settings)
    residuals = q, k, v, ChosenKeys(blocks, pos), out, lse
    return functools.partial(jax.jit(backward), residuals, dout)


def test_a_block_that_every_query_chooses_is_cut_into_segments():
    arrays, pos = inputs(90, 90, 2, 1), np.arange(90, dtype=np.int32)[None]
    members = choice(pos, 1, 90, 32, density=0.2)
    members[..., 0] = True
    want = loops(arrays, visible(members, pos, 90, 32))[1:]
    for segment in (20, 2048):
        _check(_kernels(arrays, members, pos, 32, segment=segment)(), want)


def test_packed_sequences_equal_separate_ones():
    arrays = inputs(64, 64, 2, 1, rows=2)
    pos = np.tile(np.arange(64, dtype=np.int32), (2, 1))
    pos[0, 50:] = -1  # padding after the first sequence
    chosen = choice(pos, 1, 64, 32, density=0.6)
    separate = _grads(arrays, chosen, pos, 32, **KERNELS)
    packed_pos = pos.reshape(1, 128).copy()
    packed_pos[:, 64:] += 64
    members = np.zeros((1, 128, 1, 4), bool)
    members[0, :64, :, :2], members[0, 64:, :, 2:] = chosen
    one_row = tuple(x.reshape(1, 128, *x.shape[2:]) for x in arrays)
    packed = _grads(one_row, members, packed_pos, 32, **KERNELS)
    for x, y in zip(packed, separate, strict=True):
        testing.assert_close("packed", x, y.reshape(x.shape))


def test_works_under_checkpoint_scan_and_donation():
    q, k, v, dout = inputs(24, 64, 2, 1)
    pos = causal(24, 64)
    blocks = BlockSet(pack(jnp.asarray(choice(pos, 1, 64, 32, density=0.6))), 32)

    def loss(q, **how):
        def layer(x, _):
            return selected_attention(x, k, v, blocks, pos, scale=0.125, **how), None

        return (jax.lax.scan(jax.checkpoint(layer), q, length=2)[0] * dout).sum()

    want = jax.grad(functools.partial(loss, implementation="reference"))(q)
    grad = jax.grad(functools.partial(loss, **KERNELS))
    testing.assert_close("dq", jax.jit(grad, donate_argnums=0)(q), want)


def test_works_on_each_device_for_its_own_heads():
    *arrays, dout = inputs(24, 64, 4, 2)
    pos = causal(24, 64)
    bits = pack(jnp.asarray(choice(pos, 2, 64, 32, density=0.6)))

    def grads(q, k, v, dout, bits, pos, **how):
        op = functools.partial(selected_attention, scale=0.125, **how)
        return jax.vjp(lambda *x: op(*x, BlockSet(bits, 32), pos), q, k, v)[1](dout)

    mesh = two_devices()
    heads = PartitionSpec(None, None, "heads")
    per_device = jax.shard_map(
        functools.partial(grads, **KERNELS),
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
            residuals = q, k, v, ChosenKeys(blocks, pos), q, lse
            config = KernelConfig("selected_attention", 0.125, interpret=INTERPRET)
            return triton_bwd.backward(residuals, q, config)

        keys, bits = array(1, 64), array(1, tokens // 2048, dtype="uint32")
        numbers = array(dtype="int32"), array(7, dtype="float32")
        return testing.largest_array(jax.make_jaxpr(run)(array(7, 64), keys, keys, bits, *numbers))

    assert largest(65536) <= 2 * largest(32768)
