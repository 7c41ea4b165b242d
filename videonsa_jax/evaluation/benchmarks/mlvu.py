"""MLVU, dev and test: the mean over types of questions."""

import statistics
from collections.abc import Sequence
from typing import Any

from videonsa_jax.errors import UserError
from videonsa_jax.evaluation.benchmarks.benchmark import (
    Benchmark,
    Item,
    Parser,
    Row,
    Scored,
    group,
    mean,
)
from videonsa_jax.evaluation.benchmarks.letters import ranked_letter

_LETTERS = "ABCDEF"
_SHARED = {"anomaly_reco", "count", "ego", "order", "plotQA", "topic_reasoning"}
_TYPES = {
    "dev": _SHARED | {"needle"},
    "test": _SHARED | {"needleQA", "sportsQA", "tutorialQA"},
}


def read(row: Row) -> Item:
    """Raises UserError: the type or the answer is not known."""
    kind, answer, options = row["task_type"], row["answer"], row.get("candidates") or ()
    if kind not in _TYPES["dev"] | _TYPES["test"]:
        known = ", ".join(sorted(_TYPES["dev"] | _TYPES["test"]))
        raise UserError(f"task_type={kind!r} must be one of {known}")
    if answer not in tuple(_LETTERS):
        raise UserError(f"answer={answer!r} must be a letter, A to F, as in LMMs-Eval's data set")
    if not isinstance(options, list | tuple) or len(options) > len(_LETTERS):
        raise UserError(f"candidates must be a list of at most {len(_LETTERS)}, not {options!r}")
    return Item(answer=answer, groups={"task_type": kind}, options=tuple(options))


def _letter(text: str) -> str | None:
    return text if text in tuple(_LETTERS) else None


def _before_parenthesis(text: str, item: Item) -> str | None:
    """The one character before the first ")"; without one, the whole text must be the letter."""
    del item
    head, parenthesis, _ = text.strip().partition(")")
    return _letter(head[-1:] if parenthesis else head)


def _up_to_parenthesis(text: str, item: Item) -> str | None:
    """All before the first ")": the authors' prompt ends with "Best option:(", so "B)" follows."""
    del item
    return _letter(text.partition(")")[0].strip())


def summarize(scored: Sequence[Scored]) -> dict[str, Any]:
    """The mean over the types of the split, where a type without rows counts as 0, as published.

    Raises:
      UserError: the rows are of both splits.
    """
    by_type = {kind: mean(rows) for kind, rows in group(scored, "task_type").items()}
    splits = [split for split, types in _TYPES.items() if by_type.keys() <= types]
    if not splits:
        ours = {split: sorted(by_type.keys() & types - _SHARED) for split, types in _TYPES.items()}
        raise UserError(
            f"the rows are of MLVU dev ({', '.join(ours['dev'])}) and of MLVU test "
            f"({', '.join(ours['test'])}); score one at a time"
        )
    split = splits[0]
    averaged = {kind: by_type.get(kind, 0.0) for kind in sorted(_TYPES[split])}
    return {
        "score": statistics.fmean(averaged.values()),
        "split": split,
        "averaged": averaged,
        "types_absent": sorted(_TYPES[split] - by_type.keys()),
        "mean_of_types_present": statistics.fmean(by_type.values()),
        "mean_of_rows": mean(scored),
    }


MLVU = Benchmark(
    columns={"task_type": str, "answer": str},
    read=read,
    parsers={
        "videonsa": Parser("character_before_parenthesis.1", _before_parenthesis),
        # can never be right on E and F, which the test split has
        "lmms_head": Parser("ranked_letter_a_to_d.1", lambda text, _: ranked_letter(text, "ABCD")),
        "author": Parser("up_to_parenthesis.1", _up_to_parenthesis),
    },
    other_parsers=(
        Parser("ranked_letter_a_to_f.1", lambda text, item: ranked_letter(text, _LETTERS)),
    ),
    types="task_type",
    summarize=summarize,
)
