"""One question about one video, whichever benchmark it comes from."""

import codecs
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from videonsa_jax.data.sources import begins_array
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
      UserError: there is no such file, it is not UTF-8, or a part of it is not a JSON object.
    """
    return list(read_placed_records(path).values())


def read_placed_records(path: str | pathlib.Path) -> dict[str, dict[str, Any]]:
    """`read_records` by their places for messages: "FILE:LINE", or "FILE[INDEX]" in a list."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of questions")
    data = path.read_bytes()
    if begins_array(path, data):
        records = {f"{path}[{i}]": record for i, record in enumerate(_parse(data, str(path)))}
    else:
        lines = {f"{path}:{i}": line for i, line in enumerate(data.split(b"\n"), start=1)}
        records = {
            place: _parse(line, place)
            for place, line in lines.items()
            if line.removeprefix(codecs.BOM_UTF8).strip()
        }
    for place, record in records.items():
        if not isinstance(record, dict):
            raise UserError(f"{place}: a record must be a JSON object, not {type(record).__name__}")
    return records


def _parse(data: bytes, place: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from error


def record_field(
    record: Mapping[str, Any], name: str, path: str | pathlib.Path, kind: type = object
) -> Any:
    """A field that a task cannot do without, of the type `kind`.

    Raises:
      UserError: the record lacks it, or it is of another type.
    """
    if name not in record:
        raise UserError(f"{path}: record {record.get('id')!r} has no field {name!r}")
    if not isinstance(record[name], kind):
        raise UserError(
            f"{path}: record {record.get('id')!r}: {name!r} must be of type {kind.__name__}, not "
            f"{type(record[name]).__name__}"
        )
    return record[name]


def record_turns(record: Mapping[str, Any], path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The turns of a conversation in LLaVA-Video-178K's layout.

    Raises:
      UserError: the record has none, or one has no text.
    """
    turns = record_field(record, "conversations", path, list)
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise UserError(
            f"{path}: record {record.get('id')!r}: each turn must be an object with a text 'value'"
        )
    return turns
