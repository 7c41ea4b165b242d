"""Answers are parsed from text by rule, and never guessed."""

import dataclasses
import pathlib

import pytest

from videonsa_jax.evaluation import scoring
from videonsa_jax.evaluation.question import Question

CHOICE = Question(
    id="1",
    record={"conversations": []},
    file=pathlib.Path("q.json"),
    answer="B",
    options=("a dog", "a cat"),
)
FREE = Question(
    id="2", record={"conversations": []}, file=pathlib.Path("q.json"), answer="A red car."
)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C) because", "C"),
        ("The answer is D, not A.", "D"),
        ("\nE: five", "E"),
        ("I think it is\tF", "F"),
        ("G", None),
        ("b", None),
        ("", None),
        ("Blue", None),
        ("ABBA", None),
        ("C3", None),
        ("no idea", None),
    ],
)
def test_first_standalone_letter_is_the_answer(text, letter):
    assert scoring.parse_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "n_options", "letter"),
    [("J", 10, "J"), ("(H) the ball", 8, "H"), ("K", 10, None), ("G or B", 7, "G"), ("F", 2, "F")],
)
def test_letters_go_as_far_as_the_options(text, n_options, letter):
    assert scoring.parse_letter(text, n_options) == letter


def test_tenth_option_can_be_right():
    ten = dataclasses.replace(CHOICE, answer="J", options=tuple("abcdefghij"))
    assert scoring.score("J. the last", ten) == ("J", True)
    assert scoring.score("K", ten) == (None, False)


@pytest.mark.parametrize(
    ("generated", "expected"),
    [("B. a cat", ("B", True)), ("A", ("A", False)), ("D", ("D", False)), ("cat", (None, False))],
)
def test_choice_is_scored_by_its_letter(generated, expected):
    assert scoring.score(generated, CHOICE) == expected


@pytest.mark.parametrize(
    ("generated", "expected"),
    [("a red  CAR", ("a red car", True)), ("red car", ("red car", False)), (" ", (None, False))],
)
def test_free_answer_is_an_exact_match_of_normalized_text(generated, expected):
    assert scoring.score(generated, FREE) == expected


def test_summary_counts_by_hand():
    def row(kind, correct, parsed="A", options=("x", "y"), **more):
        return {"kind": kind, "correct": correct, "parsed": parsed, "options": options, **more}

    rows = [
        row("what", True),
        row("what", False, parsed=None),
        row("count", True, options=("1", "2", "3", "4")),
        row("count", False, parsed=None, options=("1", "2", "3", "4"), error="no such file"),
    ]
    assert scoring.summarize(rows) == {
        "accuracy": 0.5,
        "n": 4,
        "kinds": {"count": {"accuracy": 0.5, "n": 2}, "what": {"accuracy": 0.5, "n": 2}},
        "chance": (2 / 2 + 2 / 4) / 4,
        "n_failed": 1,
        "n_unparsed": 1,
    }


def test_chance_comes_from_the_number_of_options():
    row = {"kind": "all", "correct": True, "parsed": "J", "options": tuple("abcdefghij")}
    assert scoring.summarize([row])["chance"] == 0.1


def test_chance_is_unknown_where_a_question_has_no_options():
    rows = [{"kind": "all", "correct": True, "parsed": "x", "options": ()}]
    assert scoring.summarize(rows)["chance"] is None
