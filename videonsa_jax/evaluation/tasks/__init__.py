"""Benchmarks: each file reads its questions; the prompt is the question's own text."""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

from videonsa_jax.errors import UserError
from videonsa_jax.evaluation.question import Question
from videonsa_jax.evaluation.tasks import mcq, needle

LOADERS: dict[str, Callable[[str | pathlib.Path], list[Question]]] = {
    "needle": needle.load,
    "mcq": mcq.load,
}


def check(task: str) -> None:
    """Raises UserError: there is no such task."""
    if task not in LOADERS:
        raise UserError(f"--task={task} must be one of {', '.join(sorted(LOADERS))}")


def load(task: str, path: str | pathlib.Path) -> list[Question]:
    """The questions of a task, in the order of its file.

    Of questions with the same id the second gets "#1" behind it, the third "#2", and so on.

    Raises:
      UserError: there is no such task, the file is unreadable, or it has no question.
    """
    check(task)
    questions = LOADERS[task](path)
    if not questions:
        raise UserError(f"{path}: has no questions")
    return list(_with_distinct_ids(questions))


def _with_distinct_ids(questions: Sequence[Question]) -> Iterator[Question]:
    taken, repeats = set(), collections.Counter()
    for question in questions:
        new = question.id
        while new in taken:
            repeats[question.id] += 1
            new = f"{question.id}#{repeats[question.id]}"
        taken.add(new)
        yield dataclasses.replace(question, id=new)
