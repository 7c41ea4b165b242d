"""Generated text -> answer -> score. What cannot be parsed is wrong; nothing is guessed."""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from videonsa_jax.evaluation.question import Question

LETTERS = string.ascii_uppercase
FEWEST_LETTERS = 6  # an answer F is one, if a wrong one, where there are fewer options


def parse_letter(text: str, n_options: int = FEWEST_LETTERS) -> str | None:
    """The first letter that stands alone, as in "B", "(B)", "B. a dog"; None without one.

    Letters go from A to F, or to that of the last option where there are more.
    """
    letters = LETTERS[: max(n_options, FEWEST_LETTERS)]
    match = re.search(rf"\b[{letters}]\b", text)
    return match.group() if match else None


def normalize(text: str) -> str:
    """For exact match: lower case, single spaces, no full stop at the end."""
    return " ".join(text.casefold().split()).rstrip(".").rstrip()


def score(generated: str, question: Question) -> tuple[str | None, bool]:
    """The parsed answer (None: there is none) and whether it is right.

    A letter where the question has options, else an exact match of the normalized texts.
    """
    if question.options:
        parsed = parse_letter(generated, len(question.options))
        return parsed, parsed == question.answer
    parsed = normalize(generated) or None
    return parsed, parsed == normalize(question.answer)


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts the rows of `videonsa_jax.evaluation.runner`.

    Returns:
      accuracy: right answers over all rows, failed ones included; null without rows.
      n: rows.
      kinds: accuracy and n of each kind of question.
      chance: the expected accuracy of guessing among each row's options; null where some row has
        none.
      n_failed: rows without an answer because the sample could not be read.
      n_unparsed: rows whose generated text holds no answer.
    """
    kinds = sorted({row["kind"] for row in rows})
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    failed = [row for row in rows if "error" in row]
    return {
        "accuracy": _accuracy(rows),
        "n": len(rows),
        "kinds": {k: {"accuracy": _accuracy(v), "n": len(v)} for k, v in by_kind.items()},
        "chance": _chance(rows),
        "n_failed": len(failed),
        "n_unparsed": sum(row["parsed"] is None for row in rows) - len(failed),
    }


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> float | None:
    return sum(row["correct"] for row in rows) / len(rows) if rows else None


def _chance(rows: Sequence[Mapping[str, Any]]) -> float | None:
    if not rows or not all(row["options"] for row in rows):
        return None
    return sum(1 / len(row["options"]) for row in rows) / len(rows)
