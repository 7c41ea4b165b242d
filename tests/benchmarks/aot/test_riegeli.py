"""Hand-made files of the part of the format that XLA uses."""

import struct

import pytest

from benchmarks.aot import riegeli

SIGNATURE = struct.pack("<QQQB7xQ", 0, 0, 0, ord("s"), 0)


def chunk(body, kind="r"):
    return struct.pack("<QQQB7xQ", 0, len(body), 0, ord(kind), 0) + body


def file(*chunks):
    """Chunks with a block header every 64 KiB."""
    body, out = b"".join((SIGNATURE, *chunks)), b""
    room = riegeli.BLOCK - riegeli.BLOCK_HEADER
    for at in range(0, len(body), room):
        header = riegeli.BEGIN if at == 0 else bytes(riegeli.BLOCK_HEADER)
        out += header + body[at : at + room]
    return out


def test_plain_records_of_several_chunks_are_joined():
    data = b"junk" + file(chunk(b"\0\x01\x05first"), chunk(b"\0\x01\x06second"))
    assert riegeli.unpack(data) == b"firstsecond"


def test_snappy_literals_and_copies():
    literal = bytes([(5 - 1) << 2]) + b"abcde"
    near = bytes([1 | (4 - 4) << 2 | 0 << 5, 3])  # 4 bytes that begin 3 back: overlapping
    far = bytes([2 | (6 - 1) << 2]) + struct.pack("<H", 9)
    values = bytes([15]) + literal + near + far
    body = b"s" + b"\x01\x0f" + bytes([15]) + values
    assert riegeli.unpack(file(chunk(body))) == b"abcde" + b"cdec" + b"abcdec"


def test_a_chunk_may_cross_blocks():
    body = b"\0\x01\x00" + bytes(range(256)) * 300
    assert riegeli.unpack(file(chunk(body))) == body[3:]


def test_a_file_in_a_record_is_unpacked_too():
    inner = file(chunk(b"\0\x01\x05inner"))
    assert riegeli.unpack(file(chunk(b"\0\x01\x05" + inner))) == b"inner"


def test_other_compression_is_an_error():
    with pytest.raises(ValueError, match="b'z'"):
        riegeli.unpack(file(chunk(b"z\x01\x05xxxxx")))


def test_something_else_is_an_error():
    with pytest.raises(ValueError, match="no Riegeli file"):
        riegeli.unpack(b"an executable of another kind")
