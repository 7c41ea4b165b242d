"""What runs the benchmark: its name, driver and clocks."""

import os
import pathlib
import platform
import shutil
import subprocess

import jax
import numpy as np

QUERIES = (  # fields of `nvidia-smi --query-gpu`
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.draw",
    "power.limit",
)


def device_name():
    """The accelerator, or the processor and its number of cores."""
    kind = jax.devices()[0].device_kind
    return processor_name() if kind == "cpu" else kind


def processor_name():
    """The processor and its number of cores."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def versions():
    """Of what computes."""
    return {
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def gpu_state():
    """Driver, clocks, temperature and power of the first GPU; None where nvidia-smi is missing."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return dict(zip(QUERIES, values, strict=True))
