"""The generated clips of `videonsa_jax.data.needle`: what happened, which came first, how many."""

import pathlib

from videonsa_jax.evaluation.question import Question, read_records, record_field


def load(path: str | pathlib.Path) -> list[Question]:
    """One question per record; options, answer and kind are fields of the record.

    Raises:
      UserError: the file is unreadable, or a record lacks a field.
    """
    return [
        Question(
            id=str(record_field(record, "id", path)),
            record={**record, "conversations": record_field(record, "conversations", path)[:-1]},
            file=pathlib.Path(path),
            answer=record_field(record, "answer", path),
            options=tuple(record_field(record, "options", path)),
            kind=record_field(record, "kind", path),
        )
        for record in read_records(path)
    ]
