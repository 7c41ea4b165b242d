"""Compiles programs ahead of time, also for devices that are not there, and says what they take."""

import dataclasses
import re
from collections.abc import Mapping

import jax

from videonsa_jax.aot.topology import ToolchainMissing
from videonsa_jax.errors import UserError

HEADROOM = 0.1  # of a device's memory, that a program should leave free
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What libtpu says of a program that needs more than the device's memory.
_TOO_LARGE = (
    r"in memory space hbm\..*?Used ([\d.]+)([KMGT]?)",
    r"total memory required for HLO temporaries \(([\d.]+)([KMGT]?)\)",
)


class CompilationError(UserError):
    """The compiler refused a program; says why in one line.

    Attributes:
      needed_bytes: of device memory, where too little of it is the reason; else None.
    """

    def __init__(self, line: str, needed_bytes: int | None = None):
        super().__init__(line)
        self.needed_bytes = needed_bytes


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Memory of one device in bytes: what a program gets, gives and works with."""

    arguments: int
    outputs: int  # donated arguments that become outputs are counted once, among the arguments
    temporaries: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries


def aot_compile(
    lowered: jax.stages.Lowered, options: Mapping[str, object] | None = None
) -> jax.stages.Compiled:
    """Compiles for the devices of the program's arguments.

    Args:
      lowered: by `jax.jit(...).lower(...)`.
      options: of the compiler.

    Raises:
      ToolchainMissing: this machine has no CUDA assembler.
      CompilationError: the compiler refused the program.
    """
    try:
        return lowered.compile(compiler_options=dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        line = " ".join(text.splitlines()[:2])[:400]
        if "No PTX compilation provider" in line or "libdevice is required" in line:
            raise ToolchainMissing(
                "neither a CUDA toolkit nor nvidia-cuda-nvcc and nvidia-nvvm"
            ) from error
        raise CompilationError(line, _needed(text)) from error


def _needed(text):
    for pattern in _TOO_LARGE:
        if match := re.search(pattern, text, re.DOTALL):
            return int(float(match[1]) * _UNITS[match[2]])
    return None


def memory(compiled: jax.stages.Compiled) -> MemoryUse:
    """What the program takes of each device, as its compiler planned it."""
    sizes = compiled.memory_analysis()
    return MemoryUse(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
    )
