"""What compiled CUDA kernels use, from their ELF files, without NVIDIA's tools."""

import dataclasses
import io
import re
import struct

from elftools.elf.elffile import ELFFile

ELF = b"\x7fELF\x02\x01"  # 64 bit, little endian
# Attributes of section .nv.info: format 4, number, size, then a symbol's index and a value.
REGISTERS, STACK = 0x2F, 0x11
# The low 9 bits of a 16-byte instruction say what it does. These are PTX's wgmma.mma_async, for
# four warps at once, and mma.sync, for one; both also exist for float32 rounded to TF32.
INSTRUCTION, OPCODE, HGMMA, HMMA = 16, 0x1FF, 0x1F0, 0x03C
ASSEMBLER = re.compile(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel as the driver would load it.

    Attributes:
      name: its function's name.
      registers: per thread.
      stack_bytes: per thread. Triton kernels index no local arrays, so a stack holds spilled
        registers.
      wgmma: matrix instructions for four warps, as they stand in the code.
      mma: matrix instructions for one warp.
    """

    name: str
    registers: int
    stack_bytes: int
    wgmma: int
    mma: int


def kernels(executable: bytes) -> list[Kernel]:
    """The kernels of all CUDA ELF files inside of a serialized executable."""
    found = []
    for match in re.finditer(re.escape(ELF), executable):
        elf = ELFFile(io.BytesIO(executable[match.start() :]))
        if elf["e_machine"] == "EM_CUDA":
            found += _kernels(elf)
    return found


def assembler(executable: bytes) -> str:
    """The version of ptxas that wrote them."""
    match = ASSEMBLER.search(executable)
    return match[1].decode() if match else "unknown"


def _kernels(elf):
    (symbols,) = (section for section in elf.iter_sections() if section["sh_type"] == "SHT_SYMTAB")
    uses = {}
    for symbol, attribute, value in _attributes(elf.get_section_by_name(".nv.info").data()):
        uses.setdefault(symbols.get_symbol(symbol).name, {})[attribute] = value
    found = []
    for name, use in uses.items():
        code = elf.get_section_by_name(f".text.{name}")
        if REGISTERS in use and code is not None:
            wgmma, mma = (_count(code.data(), opcode) for opcode in (HGMMA, HMMA))
            found.append(Kernel(name, use[REGISTERS], use[STACK], wgmma, mma))
    return found


def _attributes(info):
    """(symbol, attribute, value) of each entry that is a pair of 32-bit numbers."""
    offset = 0
    while offset < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, offset)
        offset += 4
        if form == 4:
            if size == 8:
                symbol, value = struct.unpack_from("<II", info, offset)
                yield symbol, attribute, value
            offset += size


def _count(code, opcode):
    words = struct.iter_unpack(f"<H{INSTRUCTION - 2}x", code)
    return sum(word & OPCODE == opcode for (word,) in words)
