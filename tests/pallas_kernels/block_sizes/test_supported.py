"""What the kernels take, and that what they take lowers without a TPU."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import (
    compressed_attention,
    dense_attention,
    interval_attention,
    window_attention,
)
from pallas_kernels.block_sizes import supported, tpu
from pallas_kernels.block_sizes.supported import Call

V5P = AbstractDevice(device_kind="TPU v5p", num_cores=2, platform="tpu")
BY = {"Triton kernel": supported.by_triton, "TPU kernel": supported.by_mosaic_tpu}


def _on(device):
    """As if code that is traced here ran on `device`."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def _call(*, width=128, heads=28, dtype=jnp.bfloat16, op="dense_attention", **blocks):
    q, k = (jax.ShapeDtypeStruct((1, 8, n, width), dtype) for n in (heads, 4))
    return Call.of(op, q, k, k, **blocks)


@pytest.mark.parametrize("kernel", BY)
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, None),
        ({"width": 96}, "head width 96 has no KERNEL; use one of (64, 128) or impl"),
        ({"width": 80}, "head width 80 has no KERNEL; use one of (64, 128) or impl"),
        ({"width": 80, "op": "interval_attention"}, None),
        ({"heads": 68}, "17 query heads per KV head have no KERNEL; use at most 16 or"),
        ({"dtype": jnp.int8}, "dtypes ['int8'] of q, k, v have no KERNEL; use one of ('bf"),
        ({"block": 64, "chosen_from": 8}, None),
        ({"block": 16, "chosen_from": 8}, "block size 16 has no KERNEL; use one of (32, 64) or"),
    ],
)
def test_what_has_no_kernel_is_named(kernel, sizes, message):
    reason = BY[kernel](_call(**sizes), backward=True)
    if message is None:
        assert reason is None
    else:
        assert reason.startswith(message.replace("KERNEL", kernel))
        assert reason.endswith("or implementation='xla'")
    assert supported.by_xla(_call(**sizes), backward=True) is None


def test_each_kernel_has_its_own_dtypes():
    half = _call(dtype=jnp.float16)
    assert supported.by_triton(half, backward=True) is None
    message = "dtypes ['float16'] of q, k, v have no TPU kernel; use one of ('bfloat16', 'float32')"
    assert supported.by_mosaic_tpu(half, backward=True).startswith(message)


def test_an_unknown_generation_takes_the_least_memory():
    known = [tpu.pick(kind) for kind in ("TPU v5 lite", "TPU v5p", "TPU v6 lite")]
    assert tpu.pick("TPU v99").vmem == min(sizes.vmem for sizes in known)


def _calls(queries, dtype):
    """{operation: (function, its arrays)} for 300 keys, 28 query heads and 4 KV heads of 128."""
    q, kv = (jax.ShapeDtypeStruct((1, *x, 128), dtype) for x in ((queries, 28), (300, 4)))
    pos, key_pos = (jax.ShapeDtypeStruct((1, x), jnp.int32) for x in (queries, 300))
    ranges = jax.ShapeDtypeStruct((1, queries, 2), jnp.int32)

    def dense(q, k, v, start, query_pos, key_pos):
        return dense_attention(q, k, v, start=start, query_pos=query_pos, key_pos=key_pos)

    def interval(q, k, v, ranges):
        return interval_attention(q, k, v, interval=ranges, max_length=64)

    window = functools.partial(window_attention, window=256, scale=0.1)
    calls = {
        "compressed": (functools.partial(compressed_attention, scale=0.1), (q, kv, kv, ranges)),
        "window": (window, (q, kv, kv, pos, pos)),
        "dense": (dense, (q, kv, kv, pos, pos, key_pos)),
    }
    return calls if queries != 300 else calls | {"interval": (interval, (q, kv, kv, ranges))}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("TPU v5 lite", jnp.bfloat16), ("TPU v5p", jnp.float32), ("TPU v6 lite", jnp.bfloat16)],
)
@pytest.mark.parametrize("queries", [1, 300])
def test_none_lowers_to_kernels_under_their_own_names(queries, kind, dtype):
    names = {}
    with _on(AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")):
        for op, (run, arrays) in _calls(queries, dtype).items():
            lowered = jax.jit(run).trace(*arrays).lower(lowering_platforms=("tpu",))
            names[op] = re.findall(r'kernel_name = "(\w+)"', lowered.as_text())
    want = {op: [f"{op}_attention_fwd"] for op in names}
    if queries == 300 and dtype == jnp.bfloat16:
        want["dense"] = ["splash_mha_fwd_segmented_no_residuals"]
    assert names == want
