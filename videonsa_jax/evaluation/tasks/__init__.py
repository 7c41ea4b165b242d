"""The benchmarks by name.

To add one, also from outside of this package: TASKS["mine"] = Task(load=...).
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from videonsa_jax.errors import UserError
from videonsa_jax.evaluation.question import Question
from videonsa_jax.evaluation.task import Task
from videonsa_jax.evaluation.tasks import mcq, needle

TASKS: dict[str, Task] = {
    "needle": Task(needle.load),
    "mcq": Task(mcq.load),
}


def task_of(name: str) -> Task:
    """Raises UserError: there is no such task."""
    if name not in TASKS:
        raise UserError(f"--task={name} must be one of {', '.join(sorted(TASKS))}")
    return TASKS[name]


def load(name: str, path: str | pathlib.Path) -> list[Question]:
    """The questions of a task as they are asked, in the order of its file.

    Of questions with the same id the second gets "#1" behind it, the third "#2", and so on.

    Raises:
      UserError: there is no such task, the file is unreadable, or it has no question.
    """
    task = task_of(name)
    questions = [dataclasses.replace(q, record=task.prompt(q)) for q in task.load(path)]
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
