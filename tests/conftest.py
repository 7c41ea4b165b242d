"""Every test runs on 8 virtual CPU devices and shares compiled programs with the runs before it.

The settings are environment variables, so that the programs that tests start inherit them. They
take effect because pytest reads this file before any test imports JAX.
"""

import os
import pathlib

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
