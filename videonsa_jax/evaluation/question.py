"""One question about one video, whichever benchmark it comes from."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from videonsa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Question:
    """What the model is asked, and what would be right.

    Attributes:
      id: names the question within its task.
      record: as `videonsa_jax.data.sources` reads it; it ends with the question's turn.
      file: where the record comes from; relative paths start in its folder.
      answer: the right answer, a letter where there are options.
      options: texts of the choices A, B, ...; empty for free answers.
      kind: the group it is counted in.
    """

    id: str
    record: Mapping[str, Any]
    file: pathlib.Path
    answer: str
    options: tuple[str, ...] = ()
    kind: str = "all"

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.file}, id {self.id!r}"

    @property
    def prompt(self) -> str:
        """The text of the question's turn."""
        return self.record["conversations"][-1]["value"]


def read_records(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """A JSON list, or JSON objects one a line, in the order of the file.

    Raises:
      UserError: there is no such file, or a part of it is not JSON.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of questions")
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return _parse(text, str(path))
    lines = enumerate(text.split("\n"), start=1)
    return [_parse(line, f"{path}:{number}") for number, line in lines if line.strip()]


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: not JSON: {error}") from error


def record_field(record: Mapping[str, Any], name: str, path: str | pathlib.Path) -> Any:
    """A field that a task cannot do without.

    Raises:
      UserError: the record lacks it.
    """
    if name not in record:
        raise UserError(f"{path}: record {record.get('id')!r} has no field {name!r}")
    return record[name]
