"""Multiple choice from any LLaVA-Video-178K-style file: options in the text, a letter as answer."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from videonsa_jax.errors import UserError
from videonsa_jax.evaluation import scoring
from videonsa_jax.evaluation.question import Question, read_records, record_field, record_turns

_OPTION = re.compile(rf"^\(?([{scoring.LETTERS}])[.):]\s*(\S.*?)\s*$", re.MULTILINE)
_VISUAL = re.compile(r"<(?:image|video)>\n?")


def load(path: str | pathlib.Path) -> list[Question]:
    """Every question turn of every record, each asked by itself.

    Raises:
      UserError: the file is unreadable, or a turn is not a multiple-choice question.
    """
    return [q for record in read_records(path) for q in _questions(record, path)]


def _questions(record: Mapping[str, Any], path: str | pathlib.Path) -> list[Question]:
    name = str(record_field(record, "id", path))
    turns = record_turns(record, path)
    system = turns[:1] if turns and turns[0].get("from") == "system" else []
    turns = turns[len(system) :]
    visuals = "".join(_VISUAL.findall(turns[0]["value"])) if turns else ""
    questions = []
    for number, (asked, answered) in enumerate(zip(turns[::2], turns[1::2], strict=False)):
        options = _options(asked["value"])
        answer = scoring.parse_letter(answered["value"], len(options))
        if len(options) < 2 or answer is None or answer not in scoring.LETTERS[: len(options)]:
            raise UserError(
                f"{path}: record {name!r}, turn {2 * number + len(system)}: not a multiple-choice "
                f"question; it needs lines 'A. ...', 'B. ...' and the letter of one as the answer"
            )
        if number:  # the videos were named in the first turn
            asked = {**asked, "value": visuals + asked["value"]}
        questions.append(
            Question(
                id=name if len(turns) == 2 else f"{name}#{number}",
                record={**record, "conversations": [*system, asked]},
                file=pathlib.Path(path),
                answer=answer,
                options=options,
                kind=str(record["data_source"]) if "data_source" in record else "all",
            )
        )
    return questions


def _options(text: str) -> tuple[str, ...]:
    """Texts of the last run of lines "A. ...", "B. ..." whose letters follow one another."""
    options: list[str] = []
    for letter, option in _OPTION.findall(text):
        if letter == "A":
            options = [option]
        elif options and letter == scoring.LETTERS[len(options) : len(options) + 1]:
            options.append(option)
    return tuple(options)
