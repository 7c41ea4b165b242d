"""Reads what compiled CUDA kernels use from their ELF files, without NVIDIA's tools."""

import dataclasses
import re
import struct

ELF = b"\x7fELF\x02\x01"  # 64 bit, little endian
CUDA = 190  # machine
SYMBOLS, NOTHING = 2, 8  # types of sections: symbol table; no bytes in the file
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
        elf = memoryview(executable)[match.start() :]
        if struct.unpack_from("<H", elf, 18)[0] == CUDA:
            found += _kernels(elf)
    return found


def assembler(executable: bytes) -> str:
    """The version of ptxas that wrote them."""
    match = ASSEMBLER.search(executable)
    return match[1].decode() if match else "unknown"


def _kernels(elf):
    sections = _sections(elf)
    names = _symbol_names(sections)
    uses = {}
    for symbol, attribute, value in _attributes(sections[".nv.info"][1]):
        uses.setdefault(names[symbol], {})[attribute] = value
    return [
        Kernel(
            name,
            registers=use[REGISTERS],
            stack_bytes=use[STACK],
            wgmma=_count(sections[f".text.{name}"][1], HGMMA),
            mma=_count(sections[f".text.{name}"][1], HMMA),
        )
        for name, use in uses.items()
        if REGISTERS in use and f".text.{name}" in sections
    ]


def _sections(elf):
    """{name: (type, contents)}."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, strings = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + size * i) for i in range(count)]
    contents = [
        elf[offset : offset + length] if kind != NOTHING else elf[:0]
        for _, kind, _, _, offset, length in headers
    ]
    names = bytes(contents[strings])
    return {
        _text(names, header[0]): (header[1], content)
        for header, content in zip(headers, contents, strict=True)
    }


def _symbol_names(sections):
    """Names of the symbol table's entries."""
    (table,) = (content for kind, content in sections.values() if kind == SYMBOLS)
    strings = bytes(sections[".strtab"][1])
    return [_text(strings, entry[0]) for entry in struct.iter_unpack("<IBBHQQ", table)]


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


def _text(strings, offset):
    return strings[offset : strings.index(b"\0", offset)].decode()
