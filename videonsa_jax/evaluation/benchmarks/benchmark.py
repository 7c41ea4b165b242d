"""What a published benchmark brings: how rows are read, answers parsed, scores summed up."""

import dataclasses
import statistics
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Row = Mapping[str, Any]  # the columns of the published data set, and `generated`
Profile = Literal["videonsa", "lmms_head", "author"]
PROFILES: tuple[Profile, ...] = ("videonsa", "lmms_head", "author")
LETTERS = string.ascii_uppercase


@dataclasses.dataclass(frozen=True)
class Item:
    """A question as far as scoring needs it.

    Attributes:
      answer: the right one, a letter or a number.
      groups: grouping -> the group that the question is counted in.
      options: texts of the choices A, B, ...; empty where the row does not list them.
    """

    answer: str | float
    groups: Mapping[str, str]
    options: tuple[str, ...] = ()

    @property
    def letters(self) -> str:
        """One per option."""
        return LETTERS[: len(self.options)]


@dataclasses.dataclass(frozen=True)
class Parser:
    """Finds the answer in generated text.

    Attributes:
      version: names the rule in results; its number grows whenever the rule changes.
      parse: (generated text, item) -> a letter or a number; None: the text holds no answer.
      fallback: what counts as the answer then: "wrong" (none), "random" (any option), or a letter.
    """

    version: str
    parse: Callable[[str, Item], str | float | None]
    fallback: str = "wrong"


@dataclasses.dataclass(frozen=True)
class Scored:
    """A row with what its answer is worth, from 0 to 1."""

    item: Item
    score: float


def _equal(parsed: str | float, item: Item) -> float:
    return float(parsed == item.answer)


def mean(scored: Sequence[Scored]) -> float:
    """Over all rows alike."""
    return statistics.fmean(row.score for row in scored)


def _mean_of_rows(scored: Sequence[Scored]) -> dict[str, Any]:
    return {"score": mean(scored)}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One of the benchmarks of the paper.

    Attributes:
      columns: those that scoring cannot do without, and their types.
      read: a row that has them -> item; raises UserError, whose text names the value.
      parsers: of each profile.
      types: the grouping whose groups are the benchmark's types of questions.
      other_parsers: reported beside the profile's, on the same answers.
      mark: (parsed answer, item) -> what it is worth.
      summarize: scored rows -> "score", the headline as the benchmark's authors report it, and
        what belongs to it.
    """

    columns: Mapping[str, type | tuple[type, ...]]
    read: Callable[[Row], Item]
    parsers: Mapping[Profile, Parser]
    types: str
    other_parsers: tuple[Parser, ...] = ()
    mark: Callable[[str | float, Item], float] = _equal
    summarize: Callable[[Sequence[Scored]], dict[str, Any]] = _mean_of_rows


def group(scored: Sequence[Scored], grouping: str) -> dict[str, list[Scored]]:
    """The rows of each group, in the order of the groups' names."""
    groups: dict[str, list[Scored]] = {}
    for row in scored:
        groups.setdefault(row.item.groups[grouping], []).append(row)
    return dict(sorted(groups.items()))
