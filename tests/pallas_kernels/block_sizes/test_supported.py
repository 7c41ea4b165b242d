"""Who runs on a TPU: implementations by platform, what kernels take, lowering without a TPU."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import (
    compressed_attention,
    dense_attention,
    dispatch,
    interval_attention,
    window_attention,
)
from pallas_kernels.block_sizes import supported as limits
from pallas_kernels.block_sizes import tpu as tpu_sizes

V5P = AbstractDevice(device_kind="TPU v5p", num_cores=2, platform="tpu")
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
ALL = ("reference", "xla", "triton", "mosaic_tpu")


def _on(device):
    """As if code that is traced here ran on `device`."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def _misfits(*, width=128, heads=28, dtype=jnp.bfloat16):
    q, k = (jax.ShapeDtypeStruct((1, 8, n, width), dtype) for n in (heads, 4))
    return limits.attention_misfits(q, k, k)


@pytest.mark.parametrize(("device", "name"), [(V5P, "mosaic_tpu"), (H100, "triton")])
def test_none_is_the_kernel_of_the_platform(device, name):
    with _on(device):
        assert dispatch.resolve(None, ALL) == name
        assert dispatch.resolve(name, ALL) == name
        assert dispatch.resolve(None, ALL, misfits={name: "too wide"}) == "xla"
        assert dispatch.resolve(None, ("reference", "xla")) == "xla"


@pytest.mark.parametrize("device", [H100, None])
def test_a_kernel_needs_a_tpu_or_the_interpreter(device):
    platform = "gpu" if device else "cpu"
    message = f"implementation='mosaic_tpu' runs on a TPU and the platform is '{platform}'; use"
    with _on(device), pytest.raises(ValueError, match=message):
        dispatch.resolve("mosaic_tpu", ALL)
    with _on(device):
        assert dispatch.resolve("mosaic_tpu", ALL, interpret=True) == "mosaic_tpu"


def test_each_kernel_has_its_own_misfits():
    misfits = _misfits(dtype=jnp.float16)
    assert dispatch.resolve("triton", ALL, interpret=True, misfits=misfits) == "triton"
    message = r"dtypes \['float16'\] of q, k, v have no TPU kernel; use one of \('bf.*'float32'\)"
    with pytest.raises(ValueError, match=message):
        dispatch.resolve("mosaic_tpu", ALL, interpret=True, misfits=misfits)
    assert not _misfits()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"width": 96}, "head width 96 has no TPU kernel"), ({"heads": 68}, "17 query heads per KV")],
)
def test_sizes_without_a_kernel_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        dispatch.resolve("mosaic_tpu", ALL, interpret=True, misfits=_misfits(**sizes))


def test_an_unknown_generation_takes_the_least_memory():
    known = [tpu_sizes.pick(kind) for kind in ("TPU v5 lite", "TPU v5p", "TPU v6 lite")]
    assert tpu_sizes.pick("TPU v99").vmem == min(sizes.vmem for sizes in known)


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
