"""What Mosaic's kernels take of a TPU's vector memory, as libtpu writes it into the program."""

import importlib.metadata
import re

from benchmarks.aot.report import KernelUse
from pallas_kernels import block_sizes
from videonsa_jax.aot.hlo import one_line_each

# An instruction that runs a Mosaic kernel: its name, and what it took of memory space 1, VMEM.
KERNEL = re.compile(r'%([\w.-]+) = [^\n]*custom_call_target="tpu_custom_call"[^\n]*')
TAKEN = re.compile(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)
# The name of a kernel in the path of the operation that called it, also where it is differentiated.
CALL = re.compile(r'op_name="[^"]*?(\w+)\)*/pallas_call')


def options(dump: str) -> dict:
    """More options of the compiler: none, for nothing is dumped."""
    del dump
    return {}


def kernels(lowered, compiled, dump: str) -> tuple[list[KernelUse], dict[str, str]]:
    """-> what each kernel uses, and the versions of what else compiled them."""
    del lowered, dump
    found = {}
    for line in KERNEL.finditer(one_line_each(compiled.as_text())):
        name = CALL.search(line[0])
        taken = TAKEN.search(line[0])
        if taken is None:
            raise ValueError(f"libtpu does not say what {line[1]} takes of VMEM")
        name = name[1] if name else line[1]
        found[name] = max(int(taken[1]), found.get(name, 0))
    uses = [
        KernelUse(
            name=name,
            registers=None,
            spill_bytes=None,
            shared_bytes=None,
            vmem_bytes=taken,
            wgmma=None,
            mma=None,
        )
        for name, taken in found.items()
    ]
    return uses, {"libtpu": importlib.metadata.version("libtpu")}


def problems(use: KernelUse, dtype: str, kind: str) -> list[str]:
    """Which limits a kernel breaks; libtpu refuses those that take more than they asked for."""
    del dtype
    limit = block_sizes.tpu.pick(kind).vmem
    if use.vmem_bytes > limit:
        return [f"takes {use.vmem_bytes} bytes of VMEM of {limit}"]
    return []
