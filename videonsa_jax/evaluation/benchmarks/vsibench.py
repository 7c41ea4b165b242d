"""VSI-Bench: letters, and numbers that count in part when they are near."""

import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from videonsa_jax.errors import UserError
from videonsa_jax.evaluation.benchmarks.benchmark import (
    LETTERS,
    Benchmark,
    Item,
    Parser,
    Row,
    Scored,
    group,
    mean,
)

_DIRECTIONS = [f"object_rel_direction_{level}" for level in ("easy", "medium", "hard")]
_CHOICE = [*_DIRECTIONS, "object_rel_distance", "route_planning", "obj_appearance_order"]
_NUMBER = [
    "object_abs_distance",
    "object_counting",
    "object_size_estimation",
    "room_size_estimation",
]
_TOLERANCES = 1 - np.linspace(0.5, 0.95, 10)  # in these very doubles: 0.2 is not within 1 - 0.8

_DIGITS = re.compile(r"-?\d+(?:\.\d+)?")
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {
    **{word: value for value, word in enumerate(_SMALL)},
    **{word: 10 * value for value, word in enumerate(_TENS, start=2)},
    "hundred": 100,
    "thousand": 1000,
}


def read(row: Row) -> Item:
    """Raises UserError: the type is not known, or the answer is not of the type's kind."""
    kind, truth = row["question_type"], str(row["ground_truth"])
    groups = {"question_type": kind}
    if kind in _NUMBER:
        number = _float(truth)
        if number is None or number < 0:
            raise UserError(f"ground_truth={truth!r} of {kind} must be a number, 0 or more")
        return Item(answer=number, groups=groups)
    if kind not in _CHOICE:
        raise UserError(f"question_type={kind!r} must be one of {', '.join(_CHOICE + _NUMBER)}")
    options = row.get("options")
    if not isinstance(options, list) or not 1 <= len(options) <= len(LETTERS):
        raise UserError(f"options of {kind} must be a list of texts, not {options!r}")
    item = Item(answer=truth.upper(), groups=groups, options=tuple(options))
    if item.answer not in tuple(item.letters):
        raise UserError(f"ground_truth={truth!r} must be one of {', '.join(item.letters)}")
    return item


def mean_relative_accuracy(number: float, truth: float) -> float:
    """The part of ten tolerances, 0.5, 0.45 ... 0.05, that the relative error keeps to.

    Where the truth is 0, which has no relative error, only 0 itself is right.
    """
    if truth == 0:
        return float(number == 0)
    return float(np.mean(abs(number - truth) / truth <= _TOLERANCES))


def _mark(parsed: str | float, item: Item) -> float:
    if isinstance(item.answer, float):
        return mean_relative_accuracy(parsed, item.answer)
    return float(parsed == item.answer)


def _float(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _first_word(text: str) -> str:
    """What comes before the first space, which is nothing if the text begins with one."""
    return text.split(" ")[0].rstrip(".").strip()


def _letter(text: str, item: Item) -> str | None:
    word = _first_word(text).upper()
    return word if word in tuple(item.letters) else None


def _first_word_number(text: str, item: Item) -> str | float | None:
    return _letter(text, item) if item.options else _float(_first_word(text))


def _any_number(text: str, item: Item) -> str | float | None:
    return _letter(text, item) if item.options else first_number(text)


def first_number(text: str) -> float | None:
    """The first number anywhere, in digits or English words: "two hundred and six" is 206."""
    text = text.lower()
    digits = _DIGITS.search(text)
    words = list(re.finditer(r"[a-z]+", text))
    start = next((i for i, word in enumerate(words) if word.group() in _WORDS), None)
    if digits and (start is None or digits.start() < words[start].start()):
        return _float(digits.group())
    return None if start is None else _number_in_words([word.group() for word in words[start:]])


def _number_in_words(words: Sequence[str]) -> float:
    """Of the words up to the first that is neither a number nor "and"; words are added up."""
    thousands = rest = 0
    for word in words:
        if word == "and":
            continue
        if word not in _WORDS:
            break
        value = _WORDS[word]
        if value == 1000:
            thousands, rest = thousands + 1000 * max(rest, 1), 0
        else:
            rest = 100 * max(rest, 1) if value == 100 else rest + value
    return float(thousands + rest)


def summarize(scored: Sequence[Scored]) -> dict[str, Any]:
    """The mean of eight numbers, of which one is the mean of the three relative directions.

    LMMs-Eval needs all types; here the mean is over those that have rows.
    """
    by_type = {kind: mean(rows) for kind, rows in group(scored, "question_type").items()}
    directions = [by_type[kind] for kind in _DIRECTIONS if kind in by_type]
    averaged = {kind: score for kind, score in by_type.items() if kind not in _DIRECTIONS}
    if directions:
        averaged["object_rel_direction"] = statistics.fmean(directions)
    return {
        "score": statistics.fmean(averaged.values()),
        "averaged": averaged,
        "types_absent": sorted({*_CHOICE, *_NUMBER} - by_type.keys()),
        "n_zero_truth": sum(row.item.answer == 0 for row in scored),
    }


_FIRST_WORD = Parser("first_word.1", _first_word_number)

VSIBENCH = Benchmark(
    columns={"question_type": str, "ground_truth": (str, int, float)},
    read=read,
    parsers={
        "videonsa": _FIRST_WORD,
        "lmms_head": Parser("first_word_or_any_number.1", _any_number),
        "author": _FIRST_WORD,
    },
    types="question_type",
    mark=_mark,
    summarize=summarize,
)
