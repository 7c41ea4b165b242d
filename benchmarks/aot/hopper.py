"""Compiles for an NVIDIA H100 that is not there: XLA's GPU pipeline, Triton's kernels included."""

import importlib.metadata
import os
import pathlib
import re
import tempfile
import time

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

from benchmarks.aot import cubin, riegeli
from benchmarks.aot.report import Compiled, KernelUse, MemoryUse, NotHere, Rejected

IMPLEMENTATION = "triton"
PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
NAME = "NVIDIA H100 80GB HBM3"
DEVICE_BYTES = 84_942_979_072
SHARED_LIMIT = 227 * 1024  # bytes of one block of threads
CONFIG = pathlib.Path(__file__).with_name("h100.txtpb")
# The names of Triton's kernels in a lowered module, and of any kernel in XLA's list of launches.
TRITON = re.compile(r'custom_call @__gpu\$xla\.gpu\.triton\(.*?[{,] name = "(\w+)"', re.DOTALL)
LAUNCH = re.compile(r"(\w+) grid: \[.*?\] threads: \[.*?\]\s+shared_memory: (\d+) bytes")
# Kernels that need no wgmma: they multiply nothing, or the few queries of one step.
WITHOUT_WGMMA = re.compile(r"(top_blocks|inverse_\w+|\w+_bwd_sum|\w+_decode)(_\d+)?")


def require() -> None:
    """Raises NotHere if this Python cannot compile for CUDA."""
    if lost := [name for name in PACKAGES if not _installed(name)]:
        raise NotHere(f"{', '.join(lost)} not installed")
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        raise NotHere("JAX_PLATFORMS is not 'cpu': these packages would look for a GPU")


def _installed(name):
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def problems(use: KernelUse, dtype: str) -> list[str]:
    """Which limits a kernel breaks."""
    found = []
    if use.spill_bytes:
        found.append(f"spills {use.spill_bytes} bytes per thread")
    if use.shared_bytes > SHARED_LIMIT:
        found.append(f"takes {use.shared_bytes} bytes of shared memory of {SHARED_LIMIT}")
    if dtype == "float32" and (use.wgmma or use.mma):
        found.append("rounds float32 to TF32")
    if dtype != "float32" and not use.wgmma and not WITHOUT_WGMMA.fullmatch(use.name):
        found.append("has no wgmma instruction")
    return found


def compile_program(run, arguments) -> Compiled:
    """Compiles `run` for one H100; of its kernels, those that Triton made are reported.

    Args:
      run: a function of arrays.
      arguments: of `run`, with a `jax.ShapeDtypeStruct` for each array.

    Raises:
      NotHere: this machine has no CUDA assembler.
      Rejected: the compiler refused the program.
    """
    topology = topologies.get_topology_desc(
        topology_name="", platform="cuda", target_config=CONFIG.read_text(), topology="1x1x1"
    )
    one = NamedSharding(Mesh(np.array(topology.devices), ("x",)), PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), arguments
    )
    device = AbstractDevice(device_kind=NAME, num_cores=None, platform="gpu")
    mesh = AbstractMesh((), (), abstract_device=device)
    begin = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh), tempfile.TemporaryDirectory() as dump:
        lowered = jax.jit(run).lower(*arguments)
        compiled = _compile(lowered, {"xla_gpu_autotune_level": 0, "xla_dump_to": dump})
        (launches,) = pathlib.Path(dump).glob("*.thunk_sequence.txt")
        shared = {name: int(size) for name, size in LAUNCH.findall(launches.read_text())}
    seconds = time.perf_counter() - begin
    executable = riegeli.unpack(compiled.runtime_executable().serialize())
    kernels = _only(set(TRITON.findall(lowered.as_text())), cubin.kernels(executable))
    return Compiled(
        kernels=[_use(kernel, shared) for kernel in kernels],
        memory=_memory(compiled),
        seconds=seconds,
        versions={"ptxas": cubin.assembler(executable)},
    )


def _compile(lowered, options):
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        line = str(error).splitlines()[0]
        if "No PTX compilation provider" in line or "libdevice is required" in line:
            raise NotHere("neither a CUDA toolkit nor nvidia-cuda-nvcc and nvidia-nvvm") from error
        raise Rejected(line) from error


def _only(names, kernels):
    """The kernels of these names; XLA numbers those that would have the same.

    Raises:
      ValueError: a kernel was lowered but is not in the executable.
    """
    found = [kernel for kernel in kernels if re.sub(r"_+\d+$", "", kernel.name) in names]
    if lost := names - {re.sub(r"_+\d+$", "", kernel.name) for kernel in found}:
        raise ValueError(f"kernels {sorted(lost)} were lowered and are not in the executable")
    return found


def _use(kernel, shared):
    return KernelUse(
        name=kernel.name,
        registers=kernel.registers,
        spill_bytes=kernel.stack_bytes,
        shared_bytes=shared[kernel.name],
        vmem_bytes=None,
        wgmma=kernel.wgmma,
        mma=kernel.mma,
    )


def _memory(compiled):
    sizes = compiled.memory_analysis()
    return MemoryUse(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
    )
