"""The generated clips of `videonsa_jax.data.needle`: what happened, which came first, how many."""

import pathlib
from collections.abc import Mapping
from typing import Any

from videonsa_jax.errors import UserError
from videonsa_jax.evaluation.question import Question, read_records, record_field, record_turns


def load(path: str | pathlib.Path) -> list[Question]:
    """One question per record; options, answer and kind are fields of the record.

    Raises:
      UserError: the file is unreadable, or a record lacks a field or has another type of it.
    """
    return [
        Question(
            id=str(record_field(record, "id", path)),
            record={**record, "conversations": _asked(record, path)},
            file=pathlib.Path(path),
            answer=record_field(record, "answer", path, str),
            options=tuple(record_field(record, "options", path, list)),
            kind=record_field(record, "kind", path, str),
        )
        for record in read_records(path)
    ]


def _asked(record: Mapping[str, Any], path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The turns up to the question's, without the answer."""
    turns = record_turns(record, path)[:-1]
    if not turns:
        raise UserError(f"{path}: record {record.get('id')!r} has no question and answer")
    return turns
