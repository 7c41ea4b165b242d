"""Files of records, JSON and JSONL, and several of them as one; an item is read when asked for."""

import bisect
import codecs
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from videonsa_jax.data.errors import BadSample, about_sample
from videonsa_jax.data.records import Conversation, parse_record
from videonsa_jax.errors import UserError


class Source(Protocol):
    """Random access to conversations; an item may raise BadSample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


class JsonSource:
    """The records of one file: a JSON array, or JSONL, of which only line offsets are kept."""

    def __init__(self, path: str | pathlib.Path, video_root: str | pathlib.Path | None = None):
        """Paths in the records are relative to `video_root`, or else to the file's folder.

        Raises:
          UserError: the file is missing, empty, not UTF-8, or not a JSON array where it begins
            like one.
        """
        self._path = pathlib.Path(path)
        if not self._path.is_file():
            raise UserError(f"{path}: no such file; data.source lists JSON or JSONL files")
        self._root = pathlib.Path(video_root) if video_root else self._path.parent
        self._records, self._lines = None, ()
        with self._path.open("rb") as file:
            if begins_array(self._path, file.read(4096)):
                self._records = _json_array(self._path)
            else:
                file.seek(0)
                self._lines = _line_index(file)
        if not len(self):
            raise UserError(f"{path}: holds no record")

    def __len__(self) -> int:
        return len(self._lines) if self._records is None else len(self._records)

    def __getitem__(self, index: int) -> Conversation:
        """Raises BadSample: the record is not JSON, or not a conversation with its visuals."""
        if self._records is not None:
            return parse_record(self._records[index], f"{self._path}[{index}]", self._root)
        number, offset = self._lines[index].tolist()
        name = f"{self._path}:{number}"
        with self._path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadSample(name, f"not readable as JSON: {error}") from error
        return parse_record(record, name, self._root)


class JoinedSource:
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Source]):
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Conversation:
        """Raises BadSample for whatever the part raises."""
        part = bisect.bisect_right(self._ends, index)
        with about_sample(f"record {index} of data.source"):
            return self._parts[part][index - self._ends[part] + len(self._parts[part])]


def begins_array(path: pathlib.Path, head: bytes) -> bool:
    """Whether a file, from its first bytes, is a JSON array rather than JSONL.

    Raises:
      UserError: it is UTF-16, UTF-32 or no text.
    """
    if b"\0" in head[:4]:
        raise UserError(f"{path}: is UTF-16 or UTF-32, or no text at all; save it as UTF-8")
    return head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _json_array(path: pathlib.Path) -> list:
    try:
        records = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as a JSON array: {error}") from error
    return records


def _line_index(file) -> np.ndarray:
    """i64[lines 2]: number, from 1, and offset of each line that is not blank."""
    index, offset = [], 0
    for number, line in enumerate(file, start=1):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            index.append((number, offset))
        offset += len(line)
    return np.array(index, np.int64).reshape(-1, 2)
