"""Every test runs on 8 virtual CPU devices and shares compiled programs with the runs before it.

The settings are environment variables, so that the programs that tests start inherit them. They
take effect because pytest reads this file before any test imports JAX.
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
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

# Every compiled program stays mapped, and a process that Linux refuses another mapping crashes: it
# allows 65,530.
MANY_MAPPINGS = 10_000


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
