"""What a benchmark brings."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from videonsa_jax.evaluation import scoring
from videonsa_jax.evaluation.question import Question

Row = Mapping[str, Any]  # of `videonsa_jax.evaluation.runner`


def _as_recorded(question: Question) -> Mapping[str, Any]:
    return question.record


def _nothing(rows: Sequence[Row]) -> dict[str, Any]:
    del rows
    return {}


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark: its questions, what is asked, how answers are scored and summed up.

    Attributes:
      load: path that `eval.tasks` names -> questions; raises UserError.
      prompt: question -> the record that is asked, as `videonsa_jax.data.records` reads it.
      score: (generated text, question) -> (the parsed answer, None where there is none; whether it
        is right, or the part of it that is).
      aggregate: rows of all questions -> what the summary says besides, or instead of, the fields
        of `scoring.summarize`.
    """

    load: Callable[[str | pathlib.Path], list[Question]]
    prompt: Callable[[Question], Mapping[str, Any]] = _as_recorded
    score: Callable[[str, Question], tuple[str | None, bool | float]] = scoring.score
    aggregate: Callable[[Sequence[Row]], dict[str, Any]] = _nothing
