"""Safetensors files: the library reads and checks headers, tensors are read and written in parts.

A file is the length of its header (u64, little-endian), the header (a JSON object of tensors with
their dtype, shape and range of bytes), and the tensors' bytes without a gap. The library's slices
are copies and know no 8-bit floats in NumPy, so the bytes themselves are mapped here; its writer
wants all tensors of a file in memory, so files are created here and filled part by part.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

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
_MAX_RANK = 32
_TOO_LARGE = 2**63  # bytes
_LENGTH = 8  # bytes of the header's length
_SHOWN = 300  # characters of a reason
_REASONS = {  # of the library, for what happens most
    "Error while deserializing header: incomplete metadata, file not fully covered": (
        "it is truncated, or holds bytes that belong to no tensor"
    ),
}


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
    try:
        with path.open("rb") as file:  # the library's own OSErrors have no number
            at = _LENGTH + int.from_bytes(file.read(_LENGTH), "little")
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except SafetensorError as error:
        _refuse(path, _REASONS.get(str(error), str(error)))
    tensors = {}
    for name, described in slices.items():  # the library has checked that there is no gap
        tensor = _checked(path, name, described, at)
        tensors[name] = tensor
        at += tensor.nbytes
    return tensors


def _checked(path: pathlib.Path, name: str, described: Any, offset: int) -> Stored:
    """A tensor that NumPy can hold; the library allows more."""
    label, shape = described.get_dtype(), tuple(described.get_shape())
    if label not in DTYPES:
        _refuse(path, f"tensor {name!r} has dtype {label}, expected one of {', '.join(DTYPES)}")
    dtype = DTYPES[label]
    if len(shape) > _MAX_RANK or math.prod(filter(None, shape)) * dtype.itemsize >= _TOO_LARGE:
        _refuse(path, f"tensor {name!r} has shape {shape}, more than an array can have")
    return Stored(name, dtype, shape, path, offset)


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
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
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


def _refuse(path: pathlib.Path, reason: str) -> NoReturn:
    reason = " ".join(reason.split())[:_SHOWN]
    raise UserError(f"{path}: not a valid safetensors file: {reason}; download or write it again")
