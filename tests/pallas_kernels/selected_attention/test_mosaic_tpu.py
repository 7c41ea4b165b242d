"""The TPU kernels of the selected branch: ranges of keys, sizes per generation, races, limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockSet, SelectRule, select_blocks, selected_attention
from pallas_kernels.block_sizes import tpu, tpu_vmem
from pallas_kernels.block_sparse.block_set import ChosenKeys, pack
from pallas_kernels.flash_attention.params import KernelConfig
from pallas_kernels.selected_attention import mosaic_tpu, mosaic_tpu_bwd, mosaic_tpu_tiles
from tests import testing
from tests.pallas_kernels.chosen_blocks import causal, choice, inputs, loops, visible
from tests.pallas_kernels.devices import INTERPRET, kernels
from tests.pallas_kernels.simulated_tpu import simulated_tpu

KERNELS = kernels("mosaic_tpu")


def _grads(arrays, members, pos, block=32):
    """out, dq, dk, dv; traced anew."""
    q, k, v, dout = arrays
    blocks = BlockSet(pack(jnp.asarray(members)), block)
    op = functools.partial(selected_attention, scale=q.shape[3] ** -0.5, **KERNELS)
    out, vjp = jax.vjp(lambda *x: op(*x, blocks, jnp.asarray(pos)), q, k, v)
    return out, *vjp(dout)


def _check(got, arrays, seen):
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, loops(arrays, seen), strict=True):
        testing.assert_close(name, x, y, factor=testing.SELECTED_KERNELS)


@pytest.mark.tpu
@pytest.mark.parametrize("kind", ["TPU v5p", "TPU v6e"])
def test_ranges_of_keys_join(monkeypatch, kind):
    monkeypatch.setattr(tpu_vmem, "keys_per_range", lambda *_, **__: 96)
    monkeypatch.setattr(tpu, "pick", functools.partial(lambda x, _: x, tpu.pick(kind)))
    arrays, pos = inputs(70, 230, 7, 1), causal(70, 230)
    members = choice(pos, 1, 230, 32)
    members[0, :32, :, 3:6] = False  # a tile without blocks in the second range
    grads = jax.jit(functools.partial(_grads))  # of its own: the sizes are read while it is traced
    _check(grads(arrays, members, pos), arrays, visible(members, pos, 230, 32))


def test_the_kernels_have_no_races(capfd):
    arrays, pos = inputs(17, 70, 2, 1, width=128), causal(17, 70)
    members = choice(pos, 1, 70, 32)
    with simulated_tpu(capfd):
        got = jax.block_until_ready(_grads(arrays, members, pos))
    _check(got, arrays, visible(members, pos, 70, 32))


@pytest.mark.tpu
def test_shards_of_the_keys_join_by_their_lse():
    *arrays, dout = inputs(70, 192, 4, 2)
    q, k, v = arrays
    pos = causal(70, 192)
    members = choice(pos, 2, 192, 32)
    config = KernelConfig("selected_attention", 64**-0.5, interpret=INTERPRET)
    forward = jax.jit(functools.partial(mosaic_tpu.forward, config=config))
    backward = jax.jit(functools.partial(mosaic_tpu_bwd.backward, config=config))

    def of(first):
        blocks = BlockSet(pack(jnp.asarray(members)), 32).slice(first // 32, 3)
        return (*(x[:, first : first + 96] for x in (k, v)), ChosenKeys(blocks, pos - first))

    shards = of(0), of(96)
    outs, lses = zip(*(forward(q, *x) for x in shards), strict=True)
    lse = jnp.logaddexp(*lses)
    weights = [jnp.exp(x - jnp.where(jnp.isneginf(lse), 0, lse))[..., None] for x in lses]
    out = sum(x * y for x, y in zip(weights, outs, strict=True))
    dq, dk, dv = zip(*(backward((q, *x, out, lse), dout) for x in shards), strict=True)
    got = out, sum(dq), *(jnp.concatenate(x, axis=1) for x in (dk, dv))
    _check(got, (*arrays, dout), visible(members, pos, 192, 32))


def _shapes(tokens):
    """q, k, words of bits, pos at the sizes of the 7B model."""
    words = -(-tokens // 2048)
    q, k = (jax.ShapeDtypeStruct((1, tokens, n, 128), jnp.bfloat16) for n in (28, 4))
    bits = jax.ShapeDtypeStruct((1, tokens, 4, words), jnp.uint32)
    return q, k, bits, jax.ShapeDtypeStruct((1, tokens), jnp.int32)


def _attend(q, k, v, bits, pos):
    return selected_attention(q, k, v, BlockSet(bits, 64, 32), pos, scale=1.0, **KERNELS)


def test_too_many_keys_are_refused_before_anything_is_compiled():
    q, k, bits, pos = _shapes(2**20)
    message = (
        r"1048576 keys do not fit: the vector memory of 'cpu' has 52 MiB beside 4 MiB for tiles, "
        r"one of 128 values and bfloat16 takes 512 B .* so 106496 are held .* at most 8 times .* "
        r"over 2 devices by context parallelism, or use at most 851968 keys or .*'xla'"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(_attend, q, k, k, bits, pos)
    jax.eval_shape(
        _attend, *(x.update(shape=(1, 2**19, *x.shape[2:])) for x in (q, k, k, bits, pos))
    )


def test_gradients_of_too_many_keys_are_refused():
    q, k, bits, pos = _shapes(2**19)

    def loss(q, k, v, bits, pos):
        return _attend(q, k, v, bits, pos).astype(jnp.float32).sum()

    message = r"524288 keys .* takes 1536 B .* gradients in float32.* over 2 devices by context"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(jax.grad(loss), q, k, k, bits, pos)


def test_too_many_blocks_are_refused():
    q, k = (jax.ShapeDtypeStruct((1, x, n, 128), jnp.bfloat16) for x, n in ((8, 28), (60000, 4)))
    arrays = q, k, *(jax.ShapeDtypeStruct((1, 8, *x), jnp.int32) for x in ((28,), (2,), ()))
    run = functools.partial(select_blocks, rule=SelectRule(32, 0, 1, 64), scale=1.0, **KERNELS)
    message = "60000 blocks do not fit: .* one takes 1056 B .* use at most 51634 blocks, or"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, *arrays)


def _overlapping(shared, *, tokens, block=64, count=8, pool=20):
    """bool[1 s 1 c]: `shared` of `count` blocks are the same for 64 queries; all from the last."""
    rng = np.random.default_rng(0)
    members = np.zeros((1, tokens, 1, tokens // block), bool)
    for own in range(tokens // block):
        before = rng.permutation(np.arange(max(own - pool, 0), own))
        common, others = [*before[: shared - 1], own], before[shared - 1 :]
        for query in range(own * block, (own + 1) * block):
            rest = rng.permutation(others)[: count - shared]
            members[0, query, 0, np.concatenate([common, rest]).astype(int)] = True
    return members


def _pairs(members):
    """Pairs of a query and a key that the kernels multiply, chosen or not, and that are chosen."""
    tokens, count = members.shape[1], int(members.sum(3).max())
    q, k = (jax.ShapeDtypeStruct((1, tokens, n, 128), jnp.bfloat16) for n in (7, 1))
    pos = jnp.arange(tokens, dtype=jnp.int32)[None]
    dims = mosaic_tpu_tiles.TileDims.of(q, k, 64, backward=False)

    @jax.jit
    def steps(bits):
        sees = ChosenKeys(BlockSet(bits, 64, count), pos)
        bounds = jnp.stack(mosaic_tpu_tiles.BlockSchedule.plan(dims, sees, tokens).bounds)
        visits = jnp.diff(bounds[..., 0, :], axis=-1)  # of full blocks, and of the others
        return (-(-visits // dims.blocks_per_step)).sum()

    keys = dims.blocks_per_step * dims.block
    executed = int(steps(pack(jnp.asarray(members)))) * dims.block_q * keys
    return executed, visible(members, np.asarray(pos), tokens, 64).sum()


@pytest.mark.parametrize("shared", [8, 6, 1])
def test_work_is_that_of_the_union(shared):
    members = _overlapping(shared, tokens=2048)
    executed, chosen = _pairs(members)
    unions = members.reshape(-1, 16, members.shape[3]).any(1).sum(1)
    # Two blocks per step, among those that nothing cuts and among the others.
    assert 16 * 64 * unions.sum() <= executed <= 16 * 64 * (unions + 2).sum()
    if shared == 8:  # but for the own block, of which half is in the future, and odd steps
        assert executed <= 1.4 * chosen


def test_work_grows_with_the_length_and_not_its_square():
    executed = [_pairs(_overlapping(4, tokens=tokens))[0] for tokens in (4096, 8192)]
    assert executed[1] <= 2.2 * executed[0]


def test_memory_grows_with_the_length_and_not_its_square():
    def largest(tokens):
        q, k, bits, pos = _shapes(tokens)
        grad = jax.grad(lambda *x: _attend(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        return testing.largest_array(jax.make_jaxpr(grad)(q, k, k, bits, pos))

    assert largest(65536) <= 2 * largest(32768)
