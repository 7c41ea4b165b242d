"""Benchmarks: each file reads its questions; the prompt is the question's own text."""

import pathlib
from collections.abc import Callable

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

    Raises:
      UserError: there is no such task, the file is unreadable, it has no question, or two have the
        same id.
    """
    check(task)
    questions = LOADERS[task](path)
    if not questions:
        raise UserError(f"{path}: has no questions")
    ids = set()
    for question in questions:
        if question.id in ids:
            raise UserError(f"{path}: two questions have the id {question.id!r}")
        ids.add(question.id)
    return questions
