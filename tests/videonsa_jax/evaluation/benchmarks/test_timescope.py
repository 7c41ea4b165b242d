"""TimeScope and LongTimeScope: plain accuracy, by length and type."""

import pytest

from tests.videonsa_jax.evaluation.benchmarks.stored import placed
from videonsa_jax.errors import UserError
from videonsa_jax.evaluation.score import score_rows


def row(generated, answer="A", length=60, kind="QA"):
    return {"length": length, "type": kind, "answer": answer, "generated": generated}


def test_score_is_over_rows_and_groups_are_by_length_and_type():
    rows = [row("A"), row("B"), row("f", "f", kind="OCR"), row("F", "f", 10800, "temporal")]
    summary = score_rows("timescope", "lmms_head", placed(rows))
    assert summary["score"] == 0.5
    assert summary["unparsed"] == 1
    assert summary["groups"] == {
        "length": {"60": {"score": pytest.approx(1 / 3), "n": 3}, "10800": {"score": 1, "n": 1}},
        "type": {
            "OCR": {"score": 0, "n": 1},
            "QA": {"score": 0.5, "n": 2},
            "temporal": {"score": 1, "n": 1},
        },
        "length_type": {
            "60_OCR": {"score": 0, "n": 1},
            "60_QA": {"score": 0.5, "n": 2},
            "10800_temporal": {"score": 1, "n": 1},
        },
    }
    assert summary["types_present"] == ["OCR", "QA", "temporal"]


def test_glued_phrases_of_longtimescope_change_the_score():
    answer = "Best option: C"
    short, long = row(answer, "C"), row(answer, "C", length=18000)
    assert score_rows("timescope", "author", placed([short]))["score"] == 1
    assert score_rows("longtimescope", "author", placed([long]))["score"] == 0


@pytest.mark.parametrize(
    ("task", "wrong", "message"),
    [
        ("timescope", row("A", length=18000), "length=18000 must be 60 to 10800 seconds"),
        ("longtimescope", row("A"), "length=60 must be 18000 to 36000 seconds"),
        ("timescope", row("A", kind="ocr"), "type='ocr' must be one of QA, OCR, temporal"),
        ("timescope", row("A", answer="a dog"), "answer='a dog' must be a letter, A to F"),
        ("timescope", row("A", length="60"), "column 'length' must be int, not '60'"),
    ],
)
def test_wrong_row_is_named(task, wrong, message):
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: {message}"):
        score_rows(task, "author", placed([wrong]))


def test_random_answers_need_options_which_the_rows_do_not_list():
    with pytest.raises(UserError, match=r"rows\.jsonl:1: --fallback=random needs the question's"):
        score_rows("timescope", "author", placed([row("?")]), fallback="random")
