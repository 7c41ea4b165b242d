"""What Triton's kernels use of an NVIDIA H100, read from the machine code of a compiled program."""

import pathlib
import re

from benchmarks.aot import cubin, riegeli
from benchmarks.aot.report import KernelUse

SHARED_LIMIT = 227 * 1024  # bytes of one block of threads
# The names of Triton's kernels in a lowered module, and of any kernel in XLA's list of launches.
TRITON = re.compile(r'custom_call @__gpu\$xla\.gpu\.triton\(.*?[{,] name = "(\w+)"', re.DOTALL)
LAUNCH = re.compile(r"(\w+) grid: \[.*?\] threads: \[.*?\]\s+shared_memory: (\d+) bytes")
# Kernels that need no wgmma: they multiply nothing, or the few queries of one step.
WITHOUT_WGMMA = re.compile(r"(top_blocks|gate_gradients|inverse_\w+|\w+_bwd_sum|\w+_decode)(_\d+)?")


def options(dump: str) -> dict:
    """More options of the compiler; `dump` is a folder for what `kernels` reads."""
    return {"xla_dump_to": dump}


def kernels(lowered, compiled, dump: str) -> tuple[list[KernelUse], dict[str, str]]:
    """-> what the kernels that Triton made use, and the versions of what else compiled them."""
    (launches,) = pathlib.Path(dump).glob("*.thunk_sequence.txt")
    shared = {name: int(size) for name, size in LAUNCH.findall(launches.read_text())}
    executable = riegeli.unpack(compiled.runtime_executable().serialize())
    found = _only(set(TRITON.findall(lowered.as_text())), cubin.kernels(executable))
    return [_use(kernel, shared) for kernel in found], {"ptxas": cubin.assembler(executable)}


def problems(use: KernelUse, dtype: str, kind: str) -> list[str]:
    """Which limits a kernel breaks."""
    del kind
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
