"""TimeScope: videos up to three hours; the question's text brings its own options."""

import functools
from collections.abc import Iterable

from videonsa_jax.errors import UserError
from videonsa_jax.evaluation.benchmarks.benchmark import PROFILES, Benchmark, Item, Parser, Row
from videonsa_jax.evaluation.benchmarks.letters import ANSWER_PHRASES, first_letter

_TYPES = ("QA", "OCR", "temporal")
_LETTERS = "ABCDEF"


def read(row: Row, *, shortest: int, longest: int) -> Item:
    """Lengths are in seconds. Raises UserError: a length, a type or an answer is not known."""
    length, kind, answer = row["length"], row["type"], row["answer"].upper()
    if not shortest <= length <= longest:
        raise UserError(
            f"length={length} must be {shortest} to {longest} seconds; TimeScope has 60 to 10800, "
            f"LongTimeScope 18000 to 36000"
        )
    if kind not in _TYPES:
        raise UserError(f"type={kind!r} must be one of {', '.join(_TYPES)}")
    if answer not in tuple(_LETTERS):
        raise UserError(f"answer={row['answer']!r} must be a letter, A to F")
    groups = {"length": str(length), "type": kind, "length_type": f"{length}_{kind}"}
    return Item(answer=answer, groups=groups)


def benchmark(
    *, shortest: int, longest: int, version: str, phrases: Iterable[str] = ANSWER_PHRASES
) -> Benchmark:
    """For this benchmark and LongTimeScope, which differ in lengths and in phrases deleted."""
    parser = Parser(version, lambda text, item: first_letter(text, _LETTERS, phrases))
    return Benchmark(
        columns={"length": int, "type": str, "answer": str},
        read=functools.partial(read, shortest=shortest, longest=longest),
        parsers=dict.fromkeys(PROFILES, parser),
        types="type",
    )


TIMESCOPE = benchmark(shortest=60, longest=10800, version="first_letter_a_to_f.1")
