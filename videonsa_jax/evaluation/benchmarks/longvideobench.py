"""LongVideoBench: five options at most; what cannot be parsed is a random choice.

Rows have `option0` ... `option4`, of which those not in use are "N/A" (LMMs-Eval's form), or a list
`candidates` (the authors' JSON).
"""

from videonsa_jax.errors import UserError
from videonsa_jax.evaluation.benchmarks.benchmark import (
    LETTERS,
    PROFILES,
    Benchmark,
    Item,
    Parser,
    Row,
)
from videonsa_jax.evaluation.benchmarks.letters import first_letter

_COLUMNS = [f"option{i}" for i in range(5)]
_UNUSED = "N/A"


def read(row: Row) -> Item:
    """Raises UserError: no options, a gap in them, or a right choice that is none of them."""
    options, choice = _options(row), row["correct_choice"]
    if not 0 <= choice < len(options):
        raise UserError(
            f"correct_choice={choice} must be 0 to {len(options) - 1}, one of its {len(options)} "
            f"options; the answers of the test split are not public"
        )
    return Item(
        answer=LETTERS[choice],
        options=options,
        groups={name: str(row[name]) for name in ("duration_group", "question_category")},
    )


def _options(row: Row) -> tuple[str, ...]:
    options = row.get("candidates")
    if options is None:
        missing = [name for name in _COLUMNS if name not in row]
        if missing:
            raise UserError(
                f"has no column {missing[0]!r}; it needs option0 ... option4, or a list candidates"
            )
        options = [row[name] for name in _COLUMNS]
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise UserError(f"options must be texts, 'N/A' where not in use, not {options!r}")
    used = options[: options.index(_UNUSED)] if _UNUSED in options else options
    # The prompt would leave out a gap, and letters mean other options than the scorer's.
    if any(option != _UNUSED for option in options[len(used) :]) or not 1 <= len(used) <= 5:
        raise UserError(f"options must be 1 to 5 texts, then only 'N/A', not {options!r}")
    return tuple(used)


_PARSER = Parser(
    "first_letter_a_to_e.1", lambda text, item: first_letter(text, "ABCDE"), fallback="random"
)

LONGVIDEOBENCH = Benchmark(
    columns={"duration_group": (int, str), "question_category": str, "correct_choice": int},
    read=read,
    parsers=dict.fromkeys(PROFILES, _PARSER),
    types="question_category",
)
