"""Every test runs on 8 virtual CPU devices and shares compiled programs with the runs before it.

The settings are environment variables, so that the programs that tests start inherit them. They
take effect because pytest configures itself before any test imports JAX. On a machine with a GPU or
a TPU, `pytest -m gpu` or `-m tpu` runs the tests of its kernels on it, not in the interpreter.
"""

import gc
import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    "MPLBACKEND": "Agg",
}
ON_CPU = "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"

# Every compiled program stays mapped, and a process that Linux refuses another mapping crashes: it
# allows 65,530.
MANY_MAPPINGS = 10_000


def pytest_configure(config):
    """Applies the settings; `-m gpu` and `-m tpu` leave the platform to JAX."""
    device = _device(config)
    for name, value in SETTINGS.items():
        if not (device and name in ON_CPU):
            os.environ.setdefault(name, value)


def pytest_runtest_setup(item):
    """Skips what was asked to run on a device that is not there."""
    device = _device(item.config)
    if device is not None:
        import jax

        if jax.default_backend() != device:
            pytest.skip(f"-m {device} runs kernels on a {device.upper()}, and JAX sees none here")


def _device(config):
    """ "gpu" or "tpu" if the tests were asked for by this mark, else None."""
    return config.option.markexpr if config.option.markexpr in ("gpu", "tpu") else None


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Forgets what the tests of a file compiled, before it is too much."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists():
        with maps.open() as lines:
            many = sum(1 for _ in lines) > MANY_MAPPINGS
        if many:
            sys.modules["jax"].clear_caches()
            gc.collect()
