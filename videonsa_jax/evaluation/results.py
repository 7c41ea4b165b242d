"""The rows of an evaluation: a JSONL file that survives being killed at any moment."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from videonsa_jax.errors import UserError

ESCAPED = "backslashreplace"  # lone surrogates, of which JSON text and file names may consist


class ResultFile:
    """Appends one row per question, and knows which questions an earlier run finished."""

    def __init__(self, path: str | pathlib.Path, fingerprint: str):
        """Opens the file, or starts it; a torn last line is dropped.

        Raises:
          UserError: the file holds rows of other settings, or something else than rows.
        """
        self._path, self._fingerprint = pathlib.Path(path), fingerprint
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._rows = {row["id"]: row for row in self._read()}
        self._file = self._path.open("a", encoding="utf-8", errors=ESCAPED)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __contains__(self, question_id: str) -> bool:
        return question_id in self._rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row; it is out of this process when this returns."""
        row = {**row, "settings": self._fingerprint}
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        self._rows[row["id"]] = row

    def rows(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """The rows of these questions that exist, in this order."""
        return [self._rows[i] for i in ids if i in self._rows]

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with self._path.open("r+b") as file:
                file.truncate(whole)
        lines = enumerate(data[:whole].decode("utf-8").split("\n")[:-1], start=1)
        return [self._parse(line, number) for number, line in lines]

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
            settings = row["settings"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{self._path}:{number}: not a row of an evaluation; choose another --out"
            ) from error
        if settings != self._fingerprint:
            raise UserError(
                f"{self._path}:{number} was written with other settings ({settings}, now "
                f"{self._fingerprint}); choose another --out, or delete the file to start over"
            )
        return row


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a file so that a kill leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    temporary.write_text(text, encoding="utf-8", errors=ESCAPED)
    temporary.replace(path)
