"""Keys that are split between devices give what one device with all keys gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import (
    BlockSet,
    DenseReader,
    MeshAxis,
    NSASpec,
    SelectedReader,
    combine,
    dense_attention,
    nsa_attention,
    nsa_blocks,
    nsa_shard_branches,
    sharded_attention,
)
from tests import testing
from videonsa_jax.aot.hlo import Program

ROWS, HEADS, KV_HEADS = 2, 4, 2
FAST_COMPILE = {"xla_backend_optimization_level": 0}
NAMES = ("dq", "dk", "dv", "dgates", "dq_dense", "dk_dense", "dv_dense")


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Of the sparse stream and of the dense queries, and where sequences begin and end."""

    sparse: int
    dense: int
    width: int
    block: int
    first_end: int  # row 0: the first sequence,
    second: int  # then padding, the second one
    second_end: int  # and padding
    end: int  # row 1: one sequence of odd length

    def segments(self):
        """i32[b t]."""
        ids = np.zeros((ROWS, self.sparse), np.int32)
        ids[0, self.first_end :], ids[0, self.second :], ids[0, self.second_end :] = -1, 1, -1
        ids[1, self.end :] = -1
        return ids

    def places(self):
        """Order of the sparse stream, order and start of the dense queries: i32[b .]."""
        order = np.where(self.segments() >= 0, np.arange(self.sparse, dtype=np.int32) + 10, -1)
        dense = np.arange(self.dense, dtype=np.int32) * (self.sparse // self.dense + 1)
        dense, begin = np.tile(dense, (ROWS, 1)), self.second + 10
        start = np.where((dense > begin) & (np.arange(ROWS) == 0)[:, None], begin, 0)
        return order, dense, start.astype(np.int32)


MANY = Shapes(256, 48, 16, 16, first_end=100, second=112, second_end=230, end=251)
FOR_KERNELS = Shapes(128, 16, 64, 32, first_end=50, second=64, second_end=120, end=123)


@functools.cache
def _inputs(shapes):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal((ROWS, *shape), np.float32)

    def heads(tokens):
        return [normal(tokens, n, shapes.width) for n in (HEADS, KV_HEADS, KV_HEADS)]

    gates = 1 / (1 + np.exp(-normal(shapes.sparse, HEADS, 3)))
    arrays = (*heads(shapes.sparse), gates, *heads(shapes.dense))
    return arrays, [normal(count, HEADS, shapes.width) for count in (shapes.sparse, shapes.dense)]


def _on_one_device(shapes, spec, q, k, v, gates, dense_q, dense_k, dense_v):
    order, dense_order, start = shapes.places()
    segments = shapes.segments()
    sparse = nsa_attention(q, k, v, gates, spec=spec, segment_ids=segments, implementation="xla")
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
    axis = MeshAxis(("context",), size)

    def shard(q, k, v, gates, dense_q, dense_k, dense_v, start, query_pos, segments, *key_pos):
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
            SelectedReader(sparse.blocks, sparse.pos),
            DenseReader(start, query_pos, key_pos),
        )
        streams = (k, v), (dense_k, dense_v)
        selected, dense = sharded_attention(
            (q, dense_q),
            streams,
            readers,
            axis=axis,
            scale=q.shape[-1] ** -0.5,
            mode=mode,
            implementation=implementation,
            **flags,
        )
        branches = sparse.compressed, selected, sparse.window
        return combine(gates, branches, sparse.pos), dense, sparse.blocks.bits

    heads = PartitionSpec(None, "context", "tensor")
    tokens, whole = PartitionSpec(None, "context"), PartitionSpec()
    run = jax.shard_map(
        shard,
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
def _wanted(shapes, spec):
    segments = shapes.segments()

    def run(q, k, *others):
        bits = nsa_blocks(q, k, spec=spec, segment_ids=segments, implementation="xla").bits
        return *_on_one_device(shapes, spec, q, k, *others), bits

    return _value_and_grads(run, *_inputs(shapes))


def _check(context, tensor, mode, window, *, shapes=MANY, **how):
    spec = NSASpec(block_size=shapes.block, block_count=3, window_size=window)
    order, dense_order, start = shapes.places()
    places = start, dense_order, shapes.segments(), order, dense_order
    with jax.set_mesh(_mesh(context, tensor)):
        run = _on_devices(spec, context, mode, **how)
        got = _value_and_grads(lambda *arrays: run(*arrays, *places), *_inputs(shapes))
    want = _wanted(shapes, spec)
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize("implementation", ["triton", "mosaic_tpu"])
def test_kernels_equal_one_device(implementation, mode):
    how = {"implementation": implementation, "interpret": True}
    _check(2, 1, mode, window=40, shapes=FOR_KERNELS, **how)


@pytest.mark.parametrize(
    ("tokens", "segments", "message"),
    [
        (24, 48, "x has 24 tokens, not a multiple of block=16"),
        (32, 32, r"segment_ids must be \(2, 64\) for 2 shards of 32, got \(2, 32\)"),
    ],
)
def test_a_shard_that_splits_a_block_is_rejected(tokens, segments, message):
    run = functools.partial(
        nsa_shard_branches,
        spec=NSASpec(block_size=16, block_count=3, window_size=20),
        axis=MeshAxis(("context",), 2),
        segment_ids=jnp.zeros((ROWS, segments), jnp.int32),
    )
    spec = PartitionSpec(None, "context")
    x = jax.ShapeDtypeStruct((ROWS, 2 * tokens, KV_HEADS, 16), jnp.float32)
    with jax.set_mesh(_mesh(2)), pytest.raises(ValueError, match=message):
        jax.eval_shape(jax.shard_map(run, in_specs=spec, out_specs=spec, check_vma=False), x, x, x)


def test_blocks_of_a_shard_are_those_of_the_whole():
    rng = np.random.default_rng(1)
    members = rng.random((2, 3, 2, 150)) < 0.3
    bits = np.packbits(np.pad(members, [(0, 0)] * 3 + [(0, 10)]), axis=-1, bitorder="little")
    blocks = BlockSet(jnp.asarray(bits.view(np.uint32)), block=16)
    sliced = jax.jit(BlockSet.slice, static_argnums=2)
    for first, count in ((0, 150), (0, 1), (31, 33), (32, 32), (37, 64), (64, 40), (149, 1)):
        got = sliced(blocks, jnp.int32(first), count)
        assert got.bits.shape[-1] == -(-count // 32)
        np.testing.assert_array_equal(got.members(count), members[..., first : first + count])
        assert not np.asarray(got.members(32 * got.bits.shape[-1]))[..., count:].any()


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 0), (3, 5), (7, 1), (20, 20)])
def test_a_shard_is_extended_by_what_stands_next_to_it(before, after):
    axis, length = MeshAxis(("context",), 4), 3
    x = jnp.arange(1.0, 25.0).reshape(2, 12)
    spec = PartitionSpec(None, "context")
    with jax.set_mesh(_mesh(4)):
        exchange = functools.partial(axis.halo_exchange, before=before, after=after)
        run = jax.shard_map(exchange, in_specs=spec, out_specs=spec, check_vma=False)
        got = np.asarray(jax.jit(run)(x)).reshape(2, 4, -1)
    padded = np.pad(x, ((0, 0), (before, after)))
    for i in range(4):
        want = padded[:, i * length : (i + 1) * length + before + after]
        np.testing.assert_array_equal(got[:, i], want)


@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize("context", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 8])
def test_a_device_receives_the_keys_once_and_little_else(context, mode):
    """Weak scaling: per device as many keys as ever, so bytes grow with the number of devices."""
    tokens, dense, width = 64, 16, 16
    spec = NSASpec(block_size=16, block_count=3, window_size=20)
    row = ROWS * KV_HEADS * width * 4 * 2  # bytes of a key and a value
    shapes = [
        jax.ShapeDtypeStruct((ROWS, count * context, *dims), dtype)
        for count, *dims, dtype in (
            (tokens, HEADS, width, jnp.float32),
            *((tokens, KV_HEADS, width, jnp.float32),) * 2,
            (tokens, HEADS, 3, jnp.float32),
            (dense, HEADS, width, jnp.float32),
            *((dense, KV_HEADS, width, jnp.float32),) * 2,
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
