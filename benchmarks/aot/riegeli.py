"""Unpacks the Riegeli file inside of a serialized XLA executable: the part of the format it uses.

Format: https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md and
https://github.com/google/snappy/blob/main/format_description.txt.
"""

import struct

# The first 24 bytes of a file: hash of the block header, no chunk before, next chunk at 64.
BEGIN = bytes.fromhex("83af70d10d884a3f") + struct.pack("<QQ", 0, 64)
BLOCK, BLOCK_HEADER, CHUNK_HEADER = 1 << 16, 24, 40
RECORDS = ord("r")  # type of a chunk that holds records one after the other


def unpack(data: bytes) -> bytes:
    """The contents of all records of the first Riegeli file in `data`, and of one in these, joined.

    Raises:
      ValueError: there is none, or it is compressed otherwise than by Snappy.
    """
    if BEGIN not in data:
        raise ValueError("the executable holds no Riegeli file; this XLA serializes differently")
    while BEGIN in data:
        data = _contents(data[data.index(BEGIN) :])
    return data


def _contents(file):
    blocks = (file[at + BLOCK_HEADER : at + BLOCK] for at in range(0, len(file), BLOCK))
    file = b"".join(blocks)
    contents, at = [], 0
    while at + CHUNK_HEADER <= len(file):
        size, kind = struct.unpack_from("<8xQ8xB", file, at)
        if not chr(kind).isalpha():  # what follows the file
            break
        at += CHUNK_HEADER
        if kind == RECORDS:
            contents.append(_records(file[at : at + size]))
        at += size
    return b"".join(contents)


def _records(chunk):
    """The records of a chunk: compression, size of their list of sizes, that list, the records."""
    compression = chunk[:1]
    if compression not in (b"\0", b"s"):
        raise ValueError(f"Riegeli compression {compression!r} is not known here; known: none, 's'")
    size, at = _varint(chunk, 1)
    values = chunk[at + size :]
    return values if compression == b"\0" else _snappy(values[_varint(values, 0)[1] :])


def _snappy(data):
    """Literals, and copies of what is already there."""
    size, at = _varint(data, 0)
    out = bytearray()
    while at < len(data):
        tag, at = data[at], at + 1
        kind, length = tag & 3, tag >> 2
        if kind == 0:
            if length >= 60:
                extra = length - 59
                length, at = int.from_bytes(data[at : at + extra], "little"), at + extra
            out += data[at : at + length + 1]
            at += length + 1
            continue
        if kind == 1:
            length, distance, at = (length & 7) + 3, (tag >> 5) << 8 | data[at], at + 1
        else:
            wide = 2 if kind == 2 else 4
            distance, at = int.from_bytes(data[at : at + wide], "little"), at + wide
        _copy(out, distance, length + 1)
    if len(out) != size:
        raise ValueError(f"Snappy data of {size} bytes gave {len(out)}")
    return bytes(out)


def _copy(out, distance, length):
    """Appends bytes that begin `distance` back; a copy may read what it has just written."""
    start = len(out) - distance
    while length:
        piece = out[start : start + length]
        out += piece
        start, length = start + len(piece), length - len(piece)


def _varint(data, at):
    """-> (number, where it ends)."""
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
