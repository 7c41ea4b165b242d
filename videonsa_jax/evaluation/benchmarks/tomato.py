"""TOMATO: motion over 16 frames."""

import re

from videonsa_jax.errors import UserError
from videonsa_jax.evaluation.benchmarks.benchmark import LETTERS, Benchmark, Item, Parser, Row
from videonsa_jax.evaluation.benchmarks.letters import strip_each

_ANSWER_IS = re.compile(r"Answer is:?\s*\(?([A-Fa-f])\)?")


def read(row: Row) -> Item:
    """Raises UserError: options are no texts, or the answer is none of them."""
    options, answer = row["options"], row["answer"]
    if not 1 <= len(options) <= len(LETTERS) or not all(isinstance(x, str) for x in options):
        raise UserError(f"options must be a list of 1 to {len(LETTERS)} texts, not {options!r}")
    if not 0 <= answer < len(options):
        raise UserError(f"answer={answer} must be 0 to {len(options) - 1}, one of its options")
    return Item(
        answer=LETTERS[answer],
        options=tuple(options),
        groups={name: row[name] for name in ("reason_type", "demonstration_type")},
    )


def _letter_or_text(text: str, item: Item) -> str | None:
    """LMMs-Eval's: any option's letter, be it in a word; in longer prose, an option's text.

    Of several letters the one whose "(X)" comes last, or the first option's if there is no "(X)";
    of several texts the one that comes last.
    """
    text = f" {strip_each(text, ',.!?;:' + chr(39))} "
    if letters := [letter for letter in item.letters if letter in text]:
        return max(letters, key=lambda letter: text.rfind(f"({letter})"))
    if len(text.split()) <= 5:
        return None
    places = {
        letter: text.lower().rfind(option.lower())
        for letter, option in zip(item.letters, item.options, strict=True)
    }
    letter = max(places, key=places.get)
    return letter if places[letter] >= 0 else None


def _strict(text: str, item: Item) -> str | None:
    """The authors', before a language model is asked: "A", "A: its text", "Answer is (A)"."""
    text = text.strip()
    for letter, option in zip(item.letters, item.options, strict=True):
        if text.casefold() in (letter.casefold(), f"{letter}: {option}".casefold()):
            return letter
    match = _ANSWER_IS.fullmatch(text)
    letter = match and match.group(1).upper()
    return letter if letter and letter in item.letters else None


_LMMS = Parser("letter_or_text.1", _letter_or_text, fallback="A")
_STRICT = Parser("strict_letter.1", _strict, fallback="random")

TOMATO = Benchmark(
    columns={"options": list, "answer": int, "reason_type": str, "demonstration_type": str},
    read=read,
    parsers={"videonsa": _LMMS, "lmms_head": _LMMS, "author": _STRICT},
    other_parsers=(_LMMS, _STRICT),
    types="reason_type",
)
