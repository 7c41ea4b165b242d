"""Who runs on a TPU: implementations by platform, what kernels take, sizes per generation."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import dispatch, limits, tpu_sizes

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
