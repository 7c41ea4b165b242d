"""The gradient kernels of the branches that see ranges, against float64 loops.

What they have in common with the kernels of other platforms is in `test_attention_kernels.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compressed_attention, dense_attention, window_attention
from pallas_kernels.flash_attention import triton_bwd
from tests import testing
from tests.pallas_kernels.devices import kernels, two_devices
from tests.pallas_kernels.softmax_loops import softmax_loops

pytestmark = pytest.mark.gpu
KERNELS = kernels("triton")
SCALE = 0.2


def _arrays(queries, keys, heads, kv_heads, *, rows=1, width=64, dtype="float32"):
    """q, k, v, dout."""
    rng = np.random.default_rng(queries + keys + heads)
    q, k = (rows, queries, heads, width), (rows, keys, kv_heads, width)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in (q, k, k, q))


def _compressed(visible):
    def op(q, k, v):
        return compressed_attention(q, k, v, visible, scale=SCALE, **KERNELS)[0]

    return op


def _window(start, pos, window):
    settings = {"window": window, "scale": SCALE, **KERNELS}
    return lambda q, k, v: window_attention(q, k, v, start, pos, **settings)


def _grads(op, arrays):
    q, k, v, dout = arrays
    return jax.jit(lambda q, k, v, dout: jax.vjp(op, q, k, v)[1](dout))(q, k, v, dout)


def _assert_equal_to_loops(got, arrays, seen, *, scale=SCALE):
    dtype = arrays[0].dtype.name
    want = softmax_loops(*arrays, seen, scale)[1:]
    for name, ours, theirs, x in zip(("dq", "dk", "dv"), got, want, arrays, strict=False):
        assert ours.dtype == x.dtype
        testing.assert_close(name, ours, theirs, dtype=dtype, factor=testing.RANGE_KERNELS[dtype])
        unseen = ~seen.any(2 if name == "dq" else 1)
        assert not np.asarray(ours)[unseen].any(), name


def _between(lo, hi, keys):
    """bool[b s t]: lo <= t < hi."""
    lo, hi = (np.asarray(x)[..., None] for x in (lo, hi))
    return (lo <= np.arange(keys)) & (np.arange(keys) < hi)


def _blocks_before(queries, block, offset=0):
    """i32[1 s 2]: the complete blocks before each query."""
    stop = (np.arange(queries) + offset + 1) // block
    return jnp.asarray(np.stack([0 * stop, stop], -1), jnp.int32)[None]


@pytest.mark.parametrize(("group", "block"), [(1, 1), (7, 3), (16, 8)])
def test_compressed_with_any_group(group, block):
    queries = 140
    visible = _blocks_before(queries, block)
    arrays = _arrays(queries, queries // block, group, 1)
    got = _grads(_compressed(visible), arrays)
    _assert_equal_to_loops(got, arrays, _between(*np.moveaxis(visible, 2, 0), queries // block))


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 128), ("float16", 64)])
def test_half_precision_equals_loops_over_the_rounded_inputs(dtype, width):
    visible, arrays = _blocks_before(200, 2), _arrays(200, 100, 4, 2, width=width, dtype=dtype)
    got = _grads(_compressed(visible), arrays)
    _assert_equal_to_loops(got, arrays, _between(*np.moveaxis(visible, 2, 0), 100))


@pytest.mark.parametrize(("tokens", "offset", "window"), [(1, 7, 4), (257, 0, 256)])
def test_window_anywhere(tokens, offset, window):
    pos = jnp.arange(tokens, dtype=jnp.int32)[None] + offset
    arrays = _arrays(tokens, tokens + offset + 3, 7, 1)
    got = _grads(_window(0 * pos, pos, window), arrays)
    seen = _between(pos + 1 - window, pos + 1, tokens + offset + 3)
    _assert_equal_to_loops(got, arrays, seen)


@pytest.mark.parametrize(("queries", "keys"), [(5, 300), (140, 90)])
def test_dense_positions_in_any_order(queries, keys):
    # Two sequences in shuffled order; some keys and queries are padding and hold NaN.
    rng = np.random.default_rng(keys)
    key_pos = rng.permutation(keys)[None]
    query_pos = rng.integers(keys, size=(1, queries))
    start = np.where(query_pos >= keys // 2, keys // 2, 0)
    if queries > 1:
        query_pos[:, ::5] = -1
    key_pos[:, ::7] = -1
    seen = (start[..., None] <= key_pos[:, None]) & (key_pos[:, None] <= query_pos[..., None])
    arrays = _arrays(queries, keys, 4, 2)
    mine = [jnp.asarray(seen.any(axis))[..., None, None] for axis in (2, 1)]
    q, k, v, dout = arrays
    q, dout = (jnp.where(mine[0], x, jnp.nan) for x in (q, dout))
    k, v = (jnp.where(mine[1], x, jnp.nan) for x in (k, v))
    places = {"start": start, "query_pos": query_pos, "key_pos": key_pos}
    places = {name: jnp.asarray(x, jnp.int32) for name, x in places.items()}
    op = functools.partial(dense_attention, **places, scale=SCALE, **KERNELS)
    _assert_equal_to_loops(_grads(op, (q, k, v, dout)), arrays, seen)


def test_programs_that_share_a_tile_give_what_one_program_does(monkeypatch):
    visible, arrays = _blocks_before(300, 3), _arrays(300, 100, 8, 1, dtype="bfloat16")
    shared = _grads(_compressed(visible), arrays)
    monkeypatch.setattr(triton_bwd, "PROGRAMS", 1)
    alone = _grads(_compressed(visible), arrays)
    for name, ours, theirs in zip(("dq", "dk", "dv"), alone, shared, strict=True):
        factor = testing.RANGE_KERNELS["bfloat16"]
        testing.assert_close(name, ours, theirs, dtype="bfloat16", factor=factor)


def test_recomputed_in_a_scan_over_layers():
    pos = jnp.arange(70, dtype=jnp.int32)[None]
    q, k, v, dout = _arrays(70, 70, 2, 1)

    def loss(q, k, v, **how):
        def layer(x, _):
            out = window_attention(x, k, v, 0 * pos, pos, window=20, scale=SCALE, **how)
            return x + out, None

        out, _ = jax.lax.scan(jax.checkpoint(layer), q, length=2)
        return (out * dout).sum()

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, **how), (0, 1, 2)), donate_argnums=(0,))(
            q.copy(), k, v
        )
        for how in (KERNELS, {"implementation": "xla"})
    )
    for name, got, want in zip(("dq", "dk", "dv"), ours, theirs, strict=True):
        testing.assert_close(name, got, want, factor=testing.RANGE_KERNELS["float32"])


def test_each_device_has_its_own_heads():
    visible, arrays = _blocks_before(70, 2), _arrays(70, 35, 4, 2)

    def grads(q, k, v, dout):
        return jax.vjp(_compressed(visible), q, k, v)[1](dout)

    heads = jax.sharding.PartitionSpec(None, None, "heads")
    mesh = two_devices()
    per_device = jax.shard_map(grads, mesh=mesh, in_specs=heads, out_specs=heads, check_vma=False)
    got = jax.jit(per_device)(*arrays)
    _assert_equal_to_loops(got, arrays, _between(*np.moveaxis(visible, 2, 0), 35))


def test_memory_grows_with_the_length_and_not_its_square():
    def largest(tokens):
        pos = jnp.arange(tokens, dtype=jnp.int32)[None]
        x = jax.ShapeDtypeStruct((1, tokens, 1, 64), jnp.bfloat16)
        ops = _window(0 * pos, pos, 256), _compressed(jnp.stack([0 * pos, pos // 64], -1))
        means = jax.ShapeDtypeStruct((1, tokens // 64, 1, 64), jnp.bfloat16)
        sizes = []
        for op, keys in zip(ops, (x, means), strict=True):
            run = jax.make_jaxpr(lambda q, k, v, dout, op=op: jax.vjp(op, q, k, v)[1](dout))
            sizes.append(testing.largest_array(run(x, keys, keys, x)))
        return sizes

    for long, short in zip(largest(262_144), largest(65_536), strict=True):
        assert long <= 4 * short
