"""What a compiler says of one program."""

import dataclasses

from videonsa_jax.aot.compile import MemoryUse


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """One kernel of a program; None where a device has no such thing.

    Attributes:
      name: the kernel's.
      registers: per thread.
      spill_bytes: per thread, of registers that did not fit.
      shared_bytes: of shared memory, per block of threads.
      vmem_bytes: of vector memory, on TPUs.
      wgmma: matrix instructions for a group of four warps, as they stand in the code.
      mma: matrix instructions for one warp.
    """

    name: str
    registers: int | None
    spill_bytes: int | None
    shared_bytes: int | None
    vmem_bytes: int | None
    wgmma: int | None
    mma: int | None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program: its kernels, its memory per device, what compiled it, its final HLO."""

    kernels: list[KernelUse]
    memory: MemoryUse
    seconds: float
    versions: dict[str, str]
    hlo: str
