"""Scores stored answers to the six benchmarks of the paper; needs no model.

python -m videonsa_jax.evaluation.score --task=NAME --profile=videonsa|lmms_head|author ROWS.jsonl
    [--out=FILE.json] [--fallback=wrong|random] [--seed=N]

A row has the columns of the benchmark's data set and `generated`. Prints the summary as JSON.
"""

import argparse
import dataclasses
import json
import pathlib
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from videonsa_jax.errors import UserError, file_errors
from videonsa_jax.evaluation.benchmarks import BENCHMARKS
from videonsa_jax.evaluation.benchmarks.benchmark import (
    PROFILES,
    Benchmark,
    Item,
    Parser,
    Row,
    Scored,
    group,
    mean,
)
from videonsa_jax.evaluation.question import read_placed_records
from videonsa_jax.evaluation.results import write_json

FALLBACKS = ("wrong", "random")


def main(argv: Sequence[str]) -> None:
    """Parses the command line, scores, prints and writes the summary."""
    parser = argparse.ArgumentParser(
        prog="python -m videonsa_jax.evaluation.score", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--task", required=True, help=", ".join(BENCHMARKS))
    parser.add_argument("--profile", required=True, help=", ".join(PROFILES))
    parser.add_argument("rows", type=pathlib.Path, metavar="ROWS.jsonl")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE.json", help="also write it here")
    parser.add_argument(
        "--fallback", help=f"{', '.join(FALLBACKS)}; default: what the profile's parser does"
    )
    parser.add_argument("--seed", default="0", help="of random answers, a whole number; default 0")
    args = parser.parse_args(argv)
    try:
        seed = _check_flags(args)
        with file_errors(args.rows, lambda: "nothing was scored"):
            rows = read_placed_records(args.rows)
        if not rows:
            raise UserError(f"{args.rows}: holds no row")
        summary = score_rows(args.task, args.profile, rows, fallback=args.fallback, seed=seed)
        if args.out:
            with file_errors(args.out.parent, lambda: "choose another --out"):
                write_json(args.out, summary)
    except UserError as error:
        sys.exit(f"{parser.prog}: {error}")
    print(json.dumps(summary, indent=2))


def _check_flags(args: argparse.Namespace) -> int:
    """The seed. Raises UserError: a flag's value is not allowed."""
    for flag, value, allowed in (
        ("task", args.task, BENCHMARKS),
        ("profile", args.profile, PROFILES),
        ("fallback", FALLBACKS[0] if args.fallback is None else args.fallback, FALLBACKS),
    ):
        if value not in allowed:
            raise UserError(f"--{flag}={value} must be one of {', '.join(allowed)}")
    if args.out and args.out.resolve() == args.rows.resolve():
        raise UserError(f"--out={args.out} would overwrite the rows; choose another file")
    try:
        return int(args.seed)
    except ValueError:
        raise UserError(f"--seed={args.seed} must be a whole number") from None


def score_rows(
    task: str,
    profile: str,
    rows: Mapping[str, Row],
    *,
    fallback: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Parses and scores answers.

    Args:
      task: key of `BENCHMARKS`.
      profile: one of `PROFILES`; decides on the parser.
      rows: at least one; by their places, for messages.
      fallback: of `FALLBACKS`, for answers that do not parse; None: what the parser does.
      seed: of random answers, which are drawn in the order of the rows.

    Returns:
      The summary, as docs/evaluation.md describes it.

    Raises:
      UserError: a row cannot be scored, or not together with another.
    """
    benchmark = BENCHMARKS[task]
    answers = [
        _Answer(place, _read(task, row, place), _generated(row, place))
        for place, row in rows.items()
    ]
    parser = benchmark.parsers[profile]
    scored, how = _score(benchmark, parser, answers, fallback, seed)
    groups = {name: group(scored, name) for name in scored[0].item.groups}
    others = []
    for other in benchmark.other_parsers:
        if other != parser:
            rescored, counts = _score(benchmark, other, answers, fallback, seed)
            others.append({**counts, "score": benchmark.summarize(rescored)["score"]})
    return {
        "task": task,
        "profile": profile,
        **how,
        "seed": seed,
        "n": len(rows),
        "n_failed": sum(answer.text is None for answer in answers),
        **benchmark.summarize(scored),
        "types_present": list(groups[benchmark.types]),
        "groups": {
            name: {key: {"score": mean(part), "n": len(part)} for key, part in parts.items()}
            for name, parts in groups.items()
        },
        "other_parsers": others,
    }


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What a model generated, None where the question could not be asked, and to what."""

    place: str
    item: Item
    text: str | None


def _score(
    benchmark: Benchmark,
    parser: Parser,
    answers: Sequence[_Answer],
    fallback: str | None,
    seed: int,
) -> tuple[list[Scored], dict[str, Any]]:
    """By one parser; with the rule, and how many answers it found and made up."""
    rule, draw = fallback or parser.fallback, random.Random(seed)
    scored, unparsed, guessed = [], 0, 0
    for answer in answers:
        value = None if answer.text is None else parser.parse(answer.text, answer.item)
        if value is None and answer.text is not None:
            unparsed += 1
            value = _guess(rule, answer, draw)
            guessed += value is not None
        mark = 0.0 if value is None else benchmark.mark(value, answer.item)
        scored.append(Scored(answer.item, mark))
    return scored, {
        "parser_version": parser.version,
        "unparsed": unparsed,
        "fallback": rule,
        "n_fallback": guessed,
    }


def _guess(rule: str, answer: _Answer, draw: random.Random) -> str | None:
    """What counts as the answer where none was found; None: it is wrong."""
    if rule != "random":
        return None if rule == "wrong" else rule
    if isinstance(answer.item.answer, float):  # a number cannot be guessed
        return None
    if not answer.item.letters:
        raise UserError(
            f"{answer.place}: --fallback=random needs the question's options, which the row does "
            f"not list; use --fallback=wrong"
        )
    return draw.choice(answer.item.letters)


def _generated(row: Row, place: str) -> str | None:
    """The answer's text; None where an evaluation could not ask the question."""
    text = row.get("generated")
    if isinstance(text, str):
        return text
    if text is None and row.get("error"):
        return None
    problem = f"must be a text, not {text!r}" if "generated" in row else "is missing"
    raise UserError(f"{place}: column 'generated', the model's answer, {problem}")


def _read(task: str, row: Row, place: str) -> Item:
    """Raises UserError: the row is not one of this benchmark."""
    benchmark = BENCHMARKS[task]
    for name, kinds in benchmark.columns.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if name not in row:
            others = [other for other, b in BENCHMARKS.items() if b.columns.keys() <= row.keys()]
            hint = f"; it looks like a row of {' or '.join(others)}" if others else ""
            raise UserError(f"{place}: has no column {name!r}, which {task} needs{hint}")
        if not isinstance(row[name], kinds) or isinstance(row[name], bool):
            allowed = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{place}: column {name!r} must be {allowed}, not {row[name]!r}")
    try:
        return benchmark.read(row)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
