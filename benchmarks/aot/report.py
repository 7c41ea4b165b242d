"""What a compiler says of one operation, and the limits that it must keep."""

import dataclasses


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
class MemoryUse:
    """Device memory of a program, in bytes: what it gets, gives and works with."""

    arguments: int
    outputs: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program, and the versions of what else compiled it."""

    kernels: list[KernelUse]
    memory: MemoryUse
    seconds: float
    versions: dict[str, str]


class NotHere(Exception):
    """This Python, or this machine, lacks what compiling for a target needs."""


class Rejected(Exception):
    """The compiler refused a program; says why in one line."""
