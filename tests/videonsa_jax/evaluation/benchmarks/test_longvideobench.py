"""LongVideoBench: both forms of its rows, options not in use, random answers, groups."""

import pytest

from tests.videonsa_jax.evaluation.benchmarks.stored import placed
from videonsa_jax.errors import UserError
from videonsa_jax.evaluation.score import score_rows


def row(generated, choice=0, options=("a dog", "a cat", "a car", "N/A", "N/A"), **columns):
    """As LMMs-Eval has them."""
    return {
        **{f"option{i}": option for i, option in enumerate(options)},
        "correct_choice": choice,
        "duration_group": 15,
        "question_category": "S2E",
        "generated": generated,
        **columns,
    }


def authors_row(generated, choice=0, candidates=("a dog", "a cat", "a car"), **columns):
    given = row(generated, choice, **columns)
    shared = {name: value for name, value in given.items() if not name.startswith("option")}
    return {**shared, "candidates": list(candidates)}


def score(*rows, **settings):
    return score_rows("longvideobench", "videonsa", placed(rows), **settings)


@pytest.mark.parametrize("form", [row, authors_row])
def test_both_forms_of_rows_score_alike(form):
    summary = score(
        form("A", 0),
        form("(B)", 1, duration_group=600),
        form("A", 2, question_category="T3O", duration_group=600),
    )
    assert summary["score"] == pytest.approx(2 / 3)
    assert summary["groups"] == {
        "duration_group": {"15": {"score": 1, "n": 1}, "600": {"score": 0.5, "n": 2}},
        "question_category": {"S2E": {"score": 1, "n": 2}, "T3O": {"score": 0, "n": 1}},
    }
    assert summary["types_present"] == ["S2E", "T3O"]


def test_score_does_not_weigh_groups_alike():
    summary = score(*[row("A")] * 3, row("B", question_category="T3O", duration_group=3600))
    assert summary["score"] == 0.75


@pytest.mark.parametrize("form", [row, authors_row])
def test_unparsed_answer_is_a_random_valid_choice(form):
    summary = score(*[form("no idea", choice=i % 3) for i in range(300)])
    assert (summary["unparsed"], summary["n_fallback"], summary["fallback"]) == (300, 300, "random")
    assert 0.2 < summary["score"] < 0.47  # of three options; of five it would be 0.2 at most
    assert summary["n"] == 300


def test_random_choices_follow_the_seed():
    rows = [row("no idea", choice=i % 3) for i in range(300)]
    first, again, other = score(*rows, seed=1), score(*rows, seed=1), score(*rows, seed=2)
    assert first == again
    assert first["seed"] == 1
    assert first["score"] != other["score"]


def test_only_options_in_use_are_guessed():
    one = ("a dog", "N/A", "N/A", "N/A", "N/A")
    assert score(*[row("no idea", options=one)] * 20)["score"] == 1


def test_unparsed_answer_is_wrong_where_that_is_asked_for():
    one = ("a dog", "N/A", "N/A", "N/A", "N/A")
    summary = score(row("no idea", options=one), row("A"), fallback="wrong")
    assert (summary["score"], summary["unparsed"], summary["n_fallback"]) == (0.5, 1, 0)


def test_letter_beyond_the_options_is_wrong_and_not_guessed_again():
    summary = score(row("E"), row("D"))
    assert (summary["score"], summary["unparsed"]) == (0, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (row("A", options=("a", "N/A", "c", "N/A", "N/A")), "then only 'N/A', not .*'c'"),
        (row("A", options=("N/A",) * 5), "options must be 1 to 5 texts"),
        (row("A", choice=3), "correct_choice=3 must be 0 to 2"),
        (row("A", choice=-1), "answers of the test split are not public"),
        (row("A", options=("a", "b")), "has no column 'option2'; it needs option0 ... option4, or"),
        (row("A", options=("a", "b", 3, "N/A", "N/A")), "options must be texts"),
        (authors_row("A", candidates=("a",) * 6), "options must be 1 to 5 texts"),
        (authors_row("A", choice=None), "column 'correct_choice' must be int, not None"),
        (authors_row("A", choice=True), "column 'correct_choice' must be int, not True"),
    ],
)
def test_wrong_row_is_named(wrong, message):
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{message}"):
        score(row("A"), wrong)
