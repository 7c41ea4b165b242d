"""MLVU: three profiles' parsers and one over six letters, and the mean over types."""

import pytest

from tests.videonsa_jax.evaluation.benchmarks.stored import placed
from videonsa_jax.errors import UserError
from videonsa_jax.evaluation.benchmarks import BENCHMARKS
from videonsa_jax.evaluation.benchmarks.benchmark import Item
from videonsa_jax.evaluation.score import score_rows

MLVU = BENCHMARKS["mlvu"]
ITEM = Item(answer="A", groups={})
PROSE = "the person in the video walks over to the red chair slowly"
GOLDEN = [  # generated text, videonsa, lmms_head, author, A to F; by hand
    ("", None, None, None, None),
    ("A", "A", "A", "A", "A"),
    ("A.", None, "A", None, "A"),
    ("(B) a red car", "B", "B", None, "B"),
    ("B) a red car", "B", "B", "B", "B"),
    ("B)", "B", "B", "B", "B"),
    ("(B)", "B", "B", None, "B"),
    ("(B", None, "B", None, "B"),
    ("E", "E", None, "E", "E"),
    ("F) the last", "F", None, "F", "F"),
    ("(E) Dogs", "E", "D", None, "E"),
    ("The answer is C", None, "C", None, "C"),
    ("Best option: (D)", "D", "D", None, "D"),
    ("b", None, None, None, None),
    ("(b) car", None, None, None, None),
    ("the answer is b", None, None, None, None),
    ("three", None, None, None, None),
    ("3.0 meters", None, None, None, None),
    ("A dog (B)", "B", "A", None, "A"),
    ("Answer: B", None, "B", None, "B"),
    ("I choose C because B is too far", None, "B", None, "B"),
    ("The answer is C.", None, "C", None, "C"),
    ("The correct answer is (A) the dog", "A", "A", None, "A"),
    ("A, B", None, "A", None, "A"),
    ("option D: it falls", None, "D", None, "D"),
    ("between B. and C. maybe", None, "C", None, "C"),
    ("maybe B) or C) or so", "B", "C", None, "C"),
    ("see D now and A here", None, "A", None, "A"),
    ("xDx", None, "D", None, "D"),
    ("\nB\n", "B", "B", "B", "B"),
    ("  (C) ", "C", "C", None, "C"),
    ("'D'", None, "D", None, "D"),
    (")", None, None, None, None),
    (") B", None, "B", None, "B"),
    ("(1) A", None, "A", None, "A"),
    ("G", None, None, None, None),
    (PROSE, None, None, None, None),
    (PROSE.replace("slowly", "so B"), None, "B", None, "B"),
    ("B (because of the car)", None, "B", None, "B"),
    ("F", "F", None, "F", "F"),
    ("D)The cat", "D", "D", "D", "D"),
    ("<answer>C</answer>", None, "C", None, "C"),
    ("C!?", None, "C", None, "C"),
    ("the answer is A. The answer is B. Done", None, "D", None, "D"),
    ("my choice is: D", None, "D", None, "D"),
    ("답은 C입니다", None, "C", None, "C"),
    ("(A)(B)", "A", "B", None, "B"),
    ("a)", None, None, None, None),
]


@pytest.mark.parametrize(("text", "videonsa", "lmms_head", "author", "robust"), GOLDEN)
def test_answer_is_parsed_as_the_profile_says(text, videonsa, lmms_head, author, robust):
    (other,) = MLVU.other_parsers
    parsers = {**MLVU.parsers, "robust": other}
    expected = {
        "videonsa": videonsa,
        "lmms_head": lmms_head,
        "author": author,
        "robust": robust,
    }
    assert {name: parser.parse(text, ITEM) for name, parser in parsers.items()} == expected


def rows(*wanted, profile="videonsa"):
    """Scores (task_type, answer, generated) rows."""
    return score_rows(
        "mlvu",
        profile,
        placed({"task_type": t, "answer": a, "generated": g} for t, a, g in wanted),
    )


def test_score_is_the_mean_over_types_not_over_rows():
    dev = ["anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning"]
    summary = rows(("count", "A", "A"), ("count", "A", "B"), *((t, "C", "C)") for t in dev[2:]))
    assert summary["score"] == pytest.approx(5.5 / 7)  # no anomaly_reco: it counts as 0
    assert summary["types_absent"] == ["anomaly_reco"]
    assert summary["types_present"] == dev[1:]
    assert summary["mean_of_types_present"] == pytest.approx(5.5 / 6)
    assert summary["mean_of_rows"] == pytest.approx(6 / 7)
    assert summary["groups"]["task_type"]["count"] == {"score": 0.5, "n": 2}
    assert summary["split"] == "dev"


def test_nine_types_of_the_test_split():
    summary = rows(("sportsQA", "F", "F"), ("order", "A", "(A)"))
    assert summary["split"] == "test"
    assert summary["score"] == pytest.approx(2 / 9)


def test_options_e_and_f_are_beyond_lmms_head_and_the_other_parser_says_so():
    summary = rows(("sportsQA", "F", "F"), profile="lmms_head")
    (other,) = summary["other_parsers"]
    assert (summary["score"], summary["unparsed"]) == (0, 1)
    assert other["parser_version"] == "ranked_letter_a_to_f.1"
    assert (other["score"], other["unparsed"]) == (pytest.approx(1 / 9), 0)


def test_splits_are_not_mixed():
    with pytest.raises(UserError, match=r"dev \(needle\) and of MLVU test \(tutorialQA\)"):
        rows(("needle", "A", "A"), ("tutorialQA", "A", "A"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("NQA", "A", "A"), r"rows\.jsonl:1: task_type='NQA' must be one of anomaly_reco, count"),
        (("count", "a dog", "A"), r"rows\.jsonl:1: answer='a dog' must be a letter, A to F"),
    ],
)
def test_unknown_value_is_named(row, message):
    with pytest.raises(UserError, match=message):
        rows(row)
