"""Keys that are split between devices give what one device with all keys gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import (
    BlockSet,
    DeviceAxis,
    NSASpec,
    combine,
    dense_attention,
    nsa_attention,
    nsa_blocks,
    nsa_shard_branches,
    sharded,
)
from tests import testing
from videonsa_jax.sharding.hlo import Program

ROWS, SPARSE, TEXT, HEADS, KV_HEADS, WIDTH = 2, 256, 48, 4, 2, 16
FAST_COMPILE = {"xla_backend_optimization_level": 0}
NAMES = ("dq", "dk", "dv", "dgates", "dq_dense", "dk_dense", "dv_dense")


def _segments():
    """Row 0 packs two sequences and ends in padding; row 1 is one, of odd length."""
    ids = np.zeros((ROWS, SPARSE), np.int32)
    ids[0, 100:112], ids[0, 112:], ids[0, 230:], ids[1, 251:] = -1, 1, -1, -1
    return jnp.asarray(ids)


def _dense_places():
    """order of the sparse stream, order and start of the dense queries: i32[b .]."""
    segments = _segments()
    order = jnp.where(segments >= 0, jnp.arange(SPARSE) + 10, -1)
    dense = jnp.broadcast_to(jnp.arange(TEXT, dtype=jnp.int32) * 6, (ROWS, TEXT))
    start = jnp.where((dense > 122) & (jnp.arange(ROWS) == 0)[:, None], 122, 0)
    return order, dense, start


@functools.cache
def _inputs():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal((ROWS, *shape), np.float32)

    def heads(tokens):
        return [normal(tokens, n, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS)]

    gates = 1 / (1 + np.exp(-normal(SPARSE, HEADS, 3)))
    arrays = (*heads(SPARSE), gates, *heads(TEXT))
    return arrays, (normal(SPARSE, HEADS, WIDTH), normal(TEXT, HEADS, WIDTH))


def _on_one_device(spec, q, k, v, gates, dense_q, dense_k, dense_v):
    order, dense_order, start = _dense_places()
    sparse = nsa_attention(q, k, v, gates, spec=spec, segment_ids=_segments(), implementation="xla")
    dense = dense_attention(
        dense_q,
        *(jnp.concatenate(x, axis=1) for x in ((k, dense_k), (v, dense_v))),
        start=start,
        query_pos=dense_order,
        key_pos=jnp.concatenate([order, dense_order], axis=1),
        implementation="xla",
    )
    return sparse, dense


def _on_devices(spec, size, mode, implementation="xla", **flags):
    """The same and the selected blocks, under a mesh; of the arrays and then of places."""
    axis = DeviceAxis(("context",), size)
    settings = sharded.Settings(axis, WIDTH**-0.5, implementation, **flags)

    def part(q, k, v, gates, dense_q, dense_k, dense_v, start, query_pos, segments, *key_pos):
        sparse = nsa_shard_branches(
            q,
            k,
            v,
            spec=spec,
            axis=axis,
            segment_ids=segments,
            implementation=implementation,
            **flags,
        )
        readers = (
            sharded.Selected(sparse.blocks, sparse.pos),
            sharded.Dense(start, query_pos, key_pos),
        )
        streams = (k, v), (dense_k, dense_v)
        selected, dense = sharded.attend(
            (q, dense_q), streams, readers, settings=settings, mode=mode
        )
        branches = sparse.compressed, selected, sparse.window
        return combine(gates, branches, sparse.pos), dense, sparse.blocks.bits

    heads = PartitionSpec(None, "context", "tensor")
    tokens, whole = PartitionSpec(None, "context"), PartitionSpec()
    run = jax.shard_map(
        part,
        in_specs=(*(heads,) * 7, tokens, tokens, *(whole,) * 3),
        out_specs=heads,
        check_vma=False,
    )

    return run


def _mesh(context, tensor=1):
    devices = jax.devices()[: context * tensor]
    axes = ("context", "tensor")
    return jax.make_mesh((context, tensor), axes, (AxisType.Auto,) * 2, devices=devices)


def _value_and_grads(run, arrays, douts):
    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def both(arrays, douts):
        (*outs, bits), vjp = jax.vjp(run, *arrays)
        zeros = np.zeros(bits.shape, jax.dtypes.float0)
        return outs, vjp((*douts, zeros)), bits

    return jax.device_get(both(arrays, douts))


@functools.cache
def _wanted(spec):
    def run(q, k, *others):
        bits = nsa_blocks(q, k, spec=spec, segment_ids=_segments(), implementation="xla").bits
        return *_on_one_device(spec, q, k, *others), bits

    return _value_and_grads(run, *_inputs())


def _check(context, tensor, mode, window, **how):
    spec = NSASpec(block_size=16, block_count=3, window_size=window)
    order, dense_order, start = _dense_places()
    places = start, dense_order, _segments(), order, dense_order
    with jax.set_mesh(_mesh(context, tensor)):
        run = _on_devices(spec, context, mode, **how)
        got = _value_and_grads(lambda *arrays: run(*arrays, *places), *_inputs())
    want = _wanted(spec)
    np.testing.assert_array_equal(got[2], want[2])
    for name, ours, theirs in zip(("sparse", "dense"), got[0], want[0], strict=True):
        testing.assert_close(name, ours, theirs)
    for name, ours, theirs in zip(NAMES, got[1], want[1], strict=True):
        testing.assert_close(name, ours, theirs)


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_eight_devices_equal_one(mode):
    """The window reaches over more than one device's keys."""
    _check(8, 1, mode, window=70)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize(("context", "tensor"), [(2, 1), (2, 2), (4, 1), (4, 2)])
def test_devices_equal_one(context, tensor, mode):
    _check(context, tensor, mode, window=20)


def test_blocks_of_a_part_are_those_of_the_whole():
    rng = np.random.default_rng(1)
    members = rng.random((2, 3, 2, 150)) < 0.3
    bits = np.packbits(np.pad(members, [(0, 0)] * 3 + [(0, 10)]), axis=-1, bitorder="little")
    blocks = BlockSet(jnp.asarray(bits.view(np.uint32)), block=16)
    part = jax.jit(BlockSet.part, static_argnums=2)
    for first, count in ((0, 150), (0, 1), (31, 33), (32, 32), (37, 64), (64, 40), (149, 1)):
        got = part(blocks, jnp.int32(first), count)
        assert got.bits.shape[-1] == -(-count // 32)
        np.testing.assert_array_equal(got.members(count), members[..., first : first + count])
        assert not np.asarray(got.members(32 * got.bits.shape[-1]))[..., count:].any()


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 0), (3, 5), (7, 1), (20, 20)])
def test_a_part_is_extended_by_what_stands_next_to_it(before, after):
    axis, length = DeviceAxis(("context",), 4), 3
    x = jnp.arange(1.0, 25.0).reshape(2, 12)
    spec = PartitionSpec(None, "context")
    with jax.set_mesh(_mesh(4)):
        extend = functools.partial(axis.extend, before=before, after=after)
        run = jax.shard_map(extend, in_specs=spec, out_specs=spec, check_vma=False)
        got = np.asarray(jax.jit(run)(x)).reshape(2, 4, -1)
    padded = np.pad(x, ((0, 0), (before, after)))
    for i in range(4):
        want = padded[:, i * length : (i + 1) * length + before + after]
        np.testing.assert_array_equal(got[:, i], want)


@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize("context", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 8])
def test_a_device_receives_the_keys_once_and_little_else(context, mode):
    """Weak scaling: per device as many keys as ever, so bytes grow with the number of devices."""
    tokens, dense, spec = 64, 16, NSASpec(block_size=16, block_count=3, window_size=20)
    row = ROWS * KV_HEADS * WIDTH * 4 * 2  # bytes of a key and a value
    shapes = [
        jax.ShapeDtypeStruct((ROWS, count * context, *dims), dtype)
        for count, *dims, dtype in (
            (tokens, HEADS, WIDTH, jnp.float32),
            *((tokens, KV_HEADS, WIDTH, jnp.float32),) * 2,
            (tokens, HEADS, 3, jnp.float32),
            (dense, HEADS, WIDTH, jnp.float32),
            *((dense, KV_HEADS, WIDTH, jnp.float32),) * 2,
            (dense, jnp.int32),
            (dense, jnp.int32),
            (tokens, jnp.int32),
            (tokens, jnp.int32),
            (dense, jnp.int32),
        )
    ]
    mesh = _mesh(context)
    with jax.set_mesh(mesh):
        run = _on_devices(spec, context, mode)
        compiled = jax.jit(run).lower(*shapes).compile(FAST_COMPILE)
    received = {x.kind: x.bytes for x in Program(compiled.as_text()).collectives(dict(mesh.shape))}
    means, window = (context - 1) * tokens // spec.block_size, spec.window_size - 1
    keys = (context - 1) * (tokens + dense)
    if mode == "gather":
        want = {"all-gather": (means + keys) * row, "collective-permute": window * row}
    else:
        want = {"all-gather": means * row, "collective-permute": (window + keys) * row}
    assert received == want
