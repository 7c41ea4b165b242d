"""Multiple choice from any LLaVA-Video-178K-style file: options in the text, a letter as answer."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from videonsa_jax.errors import UserError
from videonsa_jax.evaluation import scoring
from videonsa_jax.evaluation.question import Question, read_records, record_field

_OPTION = re.compile(rf"^\(?([{scoring.LETTERS}])[.):]\s*(\S.*?)\s*$", re.MULTILINE)
_VISUAL = re.compile(r"<(?:image|video)>\n?")


def load(path: str | pathlib.Path) -> list[Question]:
    """Every question turn of every record, each asked by itself.

    Raises:
      UserError: the file is unreadable, or a turn is not a multiple-choice question.
    """
    return [q for record in read_records(path) for q in _questions(record, path)]


def _questions(record: Mapping[str, Any], path: str | pathlib.Path) -> list[Question]:
    turns = record_field(record, "conversations", path)
    name = str(record_field(record, "id", path))
    visuals = "".join(_VISUAL.findall(turns[0]["value"])) if turns else ""
    questions = []
    for number, (asked, answered) in enumerate(zip(turns[::2], turns[1::2], strict=False)):
        options = _options(asked["value"])
        answer = scoring.parse_letter(answered["value"])
        if len(options) < 2 or answer is None:
            raise UserError(
                f"{path}: record {name!r}, turn {2 * number}: not a multiple-choice question; it "
                f"needs lines 'A. ...', 'B. ...' and a letter as the answer"
            )
        if number:  # the videos were named in the first turn
            asked = {**asked, "value": visuals + asked["value"]}
        questions.append(
            Question(
                id=name if len(turns) == 2 else f"{name}#{number}",
                record={**record, "conversations": [asked]},
                file=pathlib.Path(path),
                answer=answer,
                options=options,
                kind=str(record["data_source"]) if "data_source" in record else "all",
            )
        )
    return questions


def _options(text: str) -> tuple[str, ...]:
    """Texts of the lines "A. ...", "B. ..." as far as the letters follow one another."""
    found = _OPTION.findall(text)
    letters = scoring.LETTERS[: len(found)]
    return tuple(
        option for letter, (has, option) in zip(letters, found, strict=False) if has == letter
    )
