"""Where kernels are tested: in the interpreter, or under `-m gpu` and `-m tpu` on the device."""

import jax
import pytest
from jax.sharding import AxisType, Mesh

INTERPRET = jax.default_backend() == "cpu"
MARKS = {"triton": pytest.mark.gpu, "mosaic_tpu": pytest.mark.tpu}
KERNELS = [pytest.param(name, marks=mark) for name, mark in MARKS.items()]


def kernels(implementation: str) -> dict[str, str | bool]:
    """The keyword arguments by which an operation runs its kernels here."""
    return {"implementation": implementation, "interpret": INTERPRET}


def two_devices() -> Mesh:
    """A mesh of two devices along "heads"; skips the test where there is only one."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    return jax.make_mesh((2,), ("heads",), (AxisType.Auto,), devices=jax.devices()[:2])
