"""Safetensors files: headers are checked before anything is allocated, tensors read in parts.

A file is the length of its header (u64, little-endian), the header (a JSON object of tensors with
their dtype, shape and range of bytes), and the tensors' bytes without a gap.
"""

import dataclasses
import json
import math
import os
import pathlib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from videonsa_jax.errors import UserError

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, a limit of the format
_MAX_RANK = 32
_TOO_LARGE = 2**63  # bytes; no file has as many
_LENGTH = 8  # bytes of the header's length
_METADATA = "__metadata__"


@dataclasses.dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Stored(Spec):
    """A tensor in a file; nothing of it is in memory."""

    file: pathlib.Path
    offset: int  # bytes from the file's start

    def read(self, rows: slice | None = None) -> np.ndarray:
        """The tensor, or those of its rows, as an array of its own.

        Args:
          rows: of axis 0, with neither step nor negative ends.

        Raises:
          UserError: the file has become shorter since its header was read.
        """
        shape, start = self.shape, self.offset
        if rows is not None:
            first, last, _ = rows.indices(self.shape[0])
            shape = (max(last - first, 0), *self.shape[1:])
            start += first * math.prod(self.shape[1:]) * self.dtype.itemsize
        count = math.prod(shape) * self.dtype.itemsize
        data = np.fromfile(self.file, np.uint8, count, offset=start)
        if len(data) != count:
            raise UserError(
                f"{self.file}: tensor {self.name!r} ends {count - len(data)} bytes early; the file "
                "was changed while it was read"
            )
        return data.view(self.dtype).reshape(shape)

    def map(self, *, writable: bool = False) -> np.ndarray:
        """The tensor as a view of the file, to be sliced; only what is touched is read."""
        if not self.nbytes:
            return np.empty(self.shape, self.dtype)
        mode = "r+" if writable else "r"
        data = np.memmap(self.file, np.uint8, mode, self.offset, (self.nbytes,))
        return np.asarray(data).view(self.dtype).reshape(self.shape)


def read_header(path: str | os.PathLike) -> dict[str, Stored]:
    """The tensors of a file, in the order of their bytes.

    Raises:
      UserError: there is no such file, or it does not keep to the format.
    """
    path = pathlib.Path(path)
    entries, start, size = _read_entries(path)
    tensors = [_checked_entry(path, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            how = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap"
            at = f"begins at byte {tensor.offset}, expected {end}"
            _refuse(path, f"tensor {_brief(tensor.name)} {how}: it {at}")
        end += tensor.nbytes
    if end != size:
        what = "it is truncated" if end > size else "it has bytes that belong to no tensor"
        _refuse(path, f"{what}: {size} bytes, expected {end} by its header")
    return {tensor.name: tensor for tensor in tensors}


def create_file(
    path: str | os.PathLike, tensors: Sequence[Spec], metadata: Mapping[str, str]
) -> dict[str, Stored]:
    """Writes a header and reserves the space of the tensors, which are zero until written.

    Args:
      path: must not exist.
      tensors: in the order of their bytes; their names differ.
      metadata: `{"format": "pt"}` for files that `transformers` loads.

    Raises:
      OSError: the disk has no room for all of it.
    """
    path = pathlib.Path(path)
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    start = _LENGTH + len(text)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little") + text)
        file.flush()
        try:  # reserved now, a full disk is an error here instead of a crash at a write into a map
            os.posix_fallocate(file.fileno(), 0, start + at)
        except OSError as error:
            reason = f"{error.strerror} for a file of {start + at:,} bytes"
            raise OSError(error.errno, reason, str(path)) from error
    return {
        tensor.name: Stored(tensor.name, tensor.dtype, tensor.shape, path, start + begin)
        for tensor in tensors
        for begin in header[tensor.name]["data_offsets"][:1]
    }


def write_file(
    path: str | os.PathLike,
    tensors: Sequence[Spec],
    pieces: Iterable[np.ndarray],
    metadata: Mapping[str, str],
) -> dict[str, Stored]:
    """Writes a file from pieces that follow each other.

    Args:
      path: must not exist.
      tensors: in the order of their bytes.
      pieces: arrays whose bytes, one after the other, are those of the tensors.
      metadata: as for `create_file`.

    Raises:
      OSError: the disk is full.
      ValueError: the pieces have more or fewer bytes than the tensors.
    """
    stored = create_file(path, tensors, metadata)
    size = sum(tensor.nbytes for tensor in tensors)
    written = 0
    with pathlib.Path(path).open("r+b") as file:
        file.seek(-size, os.SEEK_END)
        for piece in pieces:
            written += piece.nbytes
            if written > size:
                break
            file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
    if written != size:
        raise ValueError(f"{path}: the pieces have {written} bytes or more, the tensors {size}")
    return stored


def _read_entries(path: pathlib.Path) -> tuple[dict[str, Any], int, int]:
    """-> the header without its metadata, where the tensors' bytes start, the file's size."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _LENGTH:
                _refuse(path, f"{size} bytes are too few for a header")
            length = int.from_bytes(file.read(_LENGTH), "little")
            if length > min(size - _LENGTH, _MAX_HEADER):
                limit = f"the file has {size} bytes and the format allows {_MAX_HEADER}"
                _refuse(path, f"it claims a header of {length} bytes, but {limit}")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    try:
        header = json.loads(text.decode(), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is not JSON in UTF-8 ({str(error)[:80] or 'too deep'})")
    if not isinstance(header, dict) or not text.startswith(b"{"):
        _refuse(path, "its header is not a JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        _refuse(path, f"its {_METADATA} is not an object of strings")
    return header, _LENGTH + length, size


def _unique(path: pathlib.Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, value in pairs:
        if name in found:
            _refuse(path, f"its header names {_brief(name)} twice")
        found[name] = value
    return found


def _checked_entry(path: pathlib.Path, name: str, entry: Any, start: int) -> Stored:
    """A tensor whose dtype, shape and range agree; the range may still lie outside the file."""
    what = f"tensor {_brief(name)}"
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        _refuse(path, f"{what} is described by {_brief(entry)}, expected {sorted(keys)}")
    label, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(label, str) or label not in DTYPES:
        _refuse(path, f"{what} has dtype {_brief(label)}, expected one of {', '.join(DTYPES)}")
    if not _is_counts(shape) or len(shape) > _MAX_RANK:
        _refuse(path, f"{what} has shape {_brief(shape)}, expected at most {_MAX_RANK} sizes")
    dtype = DTYPES[label]
    if math.prod(filter(None, shape)) * dtype.itemsize >= _TOO_LARGE:
        _refuse(path, f"{what} has shape {_brief(shape)}, more numbers than a file can hold")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, f"{what} has data_offsets {_brief(offsets)}, expected [begin, end]")
    tensor = Stored(name, dtype, tuple(shape), path, start + offsets[0])
    if tensor.nbytes != offsets[1] - offsets[0]:
        expected = f"expected {tensor.nbytes} for {label} {_brief(shape)}"
        _refuse(path, f"{what} has {offsets[1] - offsets[0]} bytes, {expected}")
    return tensor


def _is_counts(values: Any) -> bool:
    """A list of integers in [0, 2**63)."""
    return isinstance(values, list) and all(type(x) is int and 0 <= x < _TOO_LARGE for x in values)


def _brief(value: Any) -> str:
    """Its `repr`, cut where it is long or deep."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 80
    return brief.repr(value)


def _refuse(path: pathlib.Path, reason: str) -> NoReturn:
    raise UserError(f"{path}: not a valid safetensors file: {reason}; download or write it again")
