"""TOMATO: the parser of LMMs-Eval and the strict one, what they do without an answer, groups."""

import pytest

from tests.videonsa_jax.evaluation.benchmarks.stored import placed
from videonsa_jax.errors import UserError
from videonsa_jax.evaluation.benchmarks import BENCHMARKS
from videonsa_jax.evaluation.score import score_rows

TOMATO = BENCHMARKS["tomato"]
OPTIONS = ["moves left", "moves right", "stays still"]
PROSE = "the person in the video walks over to the red chair slowly"
GOLDEN = [  # generated text, videonsa and lmms_head, author; by hand
    ("", None, None),
    ("A", "A", "A"),
    ("B.", "B", None),
    ("b", None, "B"),
    ("(B) moves right", "B", None),
    ("B: moves right", "B", "B"),
    ("b: MOVES RIGHT", None, "B"),
    ("B: moves left", "B", None),
    ("Answer is (C)", "C", "C"),
    ("Answer is C", "A", "C"),
    ("Answer is: B", "A", "B"),
    ("The answer is C", "C", None),
    ("Answer is (D)", "A", None),
    ("Best option: (B)", "B", None),
    ("Certainly (A)", "A", None),
    ("(A) or (C)", "C", None),
    ("(C) or (A)", "A", None),
    ("A, B and C", "A", None),
    ("C, then B", "B", None),
    ("it moves left in the end", "A", None),
    ("the object moves right at last", "B", None),
    ("it moves right", None, None),
    ("it moves right at last", None, None),
    ("moves right", None, None),
    ("first it moves right, then it moves left", "A", None),
    ("first it moves left, then it moves right", "B", None),
    ("IT STAYS STILL FOR A WHILE", "A", None),
    ("It Moves Right in the end", "B", None),
    ("three", None, None),
    ("3.0 meters", None, None),
    ("C!", "C", None),
    ("'B'", "B", None),
    (" c ", None, "C"),
    ("\nA\n", "A", "A"),
    ("E", None, None),
    (PROSE, None, None),
    (PROSE.replace("slowly", "so B"), "B", None),
    ("NOT POSSIBLE TO DETERMINE", "B", None),
    ("Because it moves right in the end", "B", None),
    ("Answer is(b)", "A", "B"),
    ("answer is (B)", "B", None),
    ("Answer is (B) moves right", "B", None),
    ("A: moves left.", "A", None),
    (".,A", "A", None),
    ("I cannot tell what it does here", None, None),
    ("it does, as I said, move right", None, None),
    ("c: stays still", None, "C"),
]


def row(generated, answer=0, **columns):
    return {
        "options": OPTIONS,
        "answer": answer,
        "reason_type": "direction",
        "demonstration_type": "human",
        "generated": generated,
        **columns,
    }


@pytest.mark.parametrize(("text", "lmms", "author"), GOLDEN)
def test_answer_is_parsed_as_the_profile_says(text, lmms, author):
    item = TOMATO.read(row(text))
    expected = {"videonsa": lmms, "lmms_head": lmms, "author": author}
    assert {name: parser.parse(text, item) for name, parser in TOMATO.parsers.items()} == expected


def test_answer_that_does_not_parse_is_a_for_lmms_eval_unless_it_shall_be_wrong():
    rows = placed([row("no idea"), row("no idea", answer=1)])
    as_published = score_rows("tomato", "videonsa", rows)
    assert (as_published["score"], as_published["fallback"]) == (0.5, "A")
    assert (as_published["unparsed"], as_published["n_fallback"]) == (2, 2)
    strict = score_rows("tomato", "videonsa", rows, fallback="wrong")
    assert (strict["score"], strict["unparsed"], strict["n_fallback"]) == (0, 2, 0)


def test_both_parsers_are_reported():
    summary = score_rows("tomato", "videonsa", placed([row("Answer is C", 2)]), fallback="wrong")
    assert (summary["parser_version"], summary["score"]) == ("letter_or_text.1", 0)
    (other,) = summary["other_parsers"]
    assert (other["parser_version"], other["score"]) == ("strict_letter.1", 1)


def test_score_is_over_rows_and_groups_are_by_reason_and_demonstration():
    summary = score_rows(
        "tomato",
        "author",
        placed(
            [
                row("A", reason_type="count", demonstration_type="object"),
                row("B", reason_type="count"),
                row("A", answer=0, reason_type="shape&trend"),
            ]
        ),
    )
    assert summary["score"] == pytest.approx(2 / 3)
    assert summary["groups"] == {
        "reason_type": {"count": {"score": 0.5, "n": 2}, "shape&trend": {"score": 1, "n": 1}},
        "demonstration_type": {"human": {"score": 0.5, "n": 2}, "object": {"score": 1, "n": 1}},
    }
    assert summary["types_present"] == ["count", "shape&trend"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answer": 3}, r"rows\.jsonl:1: answer=3 must be 0 to 2"),
        ({"options": []}, r"rows\.jsonl:1: options must be a list of 1 to 26 texts, not \[\]"),
        ({"answer": "A"}, r"rows\.jsonl:1: column 'answer' must be int, not 'A'"),
    ],
)
def test_wrong_value_is_named(columns, message):
    with pytest.raises(UserError, match=message):
        score_rows("tomato", "author", placed([row("A", **columns)]))
