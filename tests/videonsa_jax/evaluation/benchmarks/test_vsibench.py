"""VSI-Bench: letters by first word, numbers by first word or anywhere, MRA, the mean of eight."""

import pytest

from tests.videonsa_jax.evaluation.benchmarks.stored import placed
from videonsa_jax.errors import UserError
from videonsa_jax.evaluation.benchmarks import BENCHMARKS
from videonsa_jax.evaluation.benchmarks.benchmark import PROFILES
from videonsa_jax.evaluation.benchmarks.vsibench import mean_relative_accuracy
from videonsa_jax.evaluation.score import score_rows

VSIBENCH = BENCHMARKS["vsibench"]
OPTIONS = ["A. chair", "B. table", "C. door", "D. lamp"]
PROSE = "the person in the video walks over to the red chair slowly"
LETTERS = [  # generated text, every profile; by hand
    ("", None),
    ("A", "A"),
    ("A.", "A"),
    ("a", "A"),
    ("B. the chair", "B"),
    ("B the chair", "B"),
    ("(B) the chair", None),
    ("B) the chair", None),
    ("B: the chair", None),
    ("B, the chair", None),
    ("B.. what", "B"),
    (" B", None),
    ("B ", "B"),
    ("B\n", "B"),
    ("B.\n", None),
    ("\nB", "B"),
    ("B\nbecause", None),
    ("The answer is C", None),
    ("C. ", "C"),
    ("E", None),
    ("E. door", None),
    ("d.", "D"),
    ("three", None),
    ("3.0 meters", None),
    ("chair", None),
    ("A chair", "A"),
    ("AB", None),
    ("a.", "A"),
    ("D,", None),
    ("C!", None),
    ("**C**", None),
    ("Answer: B", None),
    ("Best option: (D)", None),
    (".", None),
    (". B", None),
    ("B .", "B"),
    ("A/B", None),
    ("A or B", "A"),
    ("c because", "C"),
    (PROSE, None),
    (PROSE.replace("slowly", "so B"), None),
    ("I think B", None),
    ("B.C", None),
    ("D. D", "D"),
]
NUMBERS = [  # generated text, videonsa and author, lmms_head; by hand
    ("", None, None),
    ("3", 3, 3),
    ("3.", 3, 3),
    ("3.0 meters", 3, 3),
    ("3.5", 3.5, 3.5),
    ("three", None, 3),
    ("Three boxes.", None, 3),
    ("There are 3 boxes", None, 3),
    ("about 2.5 m", None, 2.5),
    ("2.5m", None, 2.5),
    ("-2", -2, -2),
    ("+3", 3, 3),
    ("1,000", None, 1),
    ("1000", 1000, 1000),
    ("1e2", 100, 1),
    ("1_000", 1000, 1),
    (".5", 0.5, 5),
    (" 4", None, 4),
    ("4 ", 4, 4),
    ("4\n", 4, 4),
    ("4\nchairs", None, 4),
    ("twenty-one", None, 21),
    ("one hundred", None, 100),
    ("hundred", None, 100),
    ("three hundred and twenty-one", None, 321),
    ("two thousand", None, 2000),
    ("two thousand and six", None, 2006),
    ("one hundred thousand", None, 100_000),
    ("one apple, room 2", None, 1),
    ("room 2, one apple", None, 2),
    ("one or two", None, 1),
    ("one two", None, 3),
    ("and one", None, 1),
    ("someone", None, None),
    ("zero", None, 0),
    ("0", 0, 0),
    ("no number", None, None),
    ("nan", None, None),
    ("inf", None, None),
    ("A", None, None),
    ("3 4", 3, 3),
    ("3-4", None, 3),
    ("-", None, None),
    ("5..", 5, 5),
    ("6:", None, 6),
    ("(7)", None, 7),
    ("ten", None, 10),
    ("3.0.1", None, 3),
    ("1/2", None, 1),
    (PROSE, None, None),
    (PROSE.replace("slowly", "of twelve"), None, 12),
]


def choice(generated, truth="A", kind="route_planning"):
    return {
        "question_type": kind,
        "ground_truth": truth,
        "options": OPTIONS,
        "generated": generated,
    }


def number(generated, truth="100", kind="object_counting"):
    return {
        "question_type": kind,
        "ground_truth": truth,
        "options": None,
        "generated": generated,
    }


@pytest.mark.parametrize(("text", "letter"), LETTERS)
@pytest.mark.parametrize("profile", PROFILES)
def test_first_word_is_the_letter(profile, text, letter):
    assert VSIBENCH.parsers[profile].parse(text, VSIBENCH.read(choice(text))) == letter


@pytest.mark.parametrize(("text", "first_word", "anywhere"), NUMBERS)
def test_number_is_parsed_as_the_profile_says(text, first_word, anywhere):
    item = VSIBENCH.read(number(text))
    expected = {"videonsa": first_word, "lmms_head": anywhere, "author": first_word}
    parsed = {name: parser.parse(text, item) for name, parser in VSIBENCH.parsers.items()}
    assert parsed == expected


@pytest.mark.parametrize(
    ("value", "truth", "accuracy"),
    [
        (100, 100, 1.0),
        (105, 100, 1.0),  # 0.05 is within 1 - 0.95, which is a little more in doubles
        (95, 100, 1.0),
        (21, 20, 1.0),
        (106, 100, 0.9),
        (110, 100, 0.9),
        (120, 100, 0.6),  # 0.2 is not within 1 - 0.8, which is a little less
        (125, 100, 0.6),
        (145, 100, 0.1),  # nor 0.45 within 1 - 0.55
        (150, 100, 0.1),
        (50, 100, 0.1),
        (151, 100, 0.0),
        (0, 100, 0.0),
        (-100, 100, 0.0),
        (0, 0, 1.0),
        (1, 0, 0.0),
    ],
)
def test_mean_relative_accuracy_at_its_boundaries(value, truth, accuracy):
    assert mean_relative_accuracy(value, truth) == pytest.approx(accuracy)


def test_three_directions_are_one_of_the_numbers_averaged():
    direction = "object_rel_direction_"
    summary = score_rows(
        "vsibench",
        "author",
        placed(
            [
                choice("A", kind=direction + "easy"),
                choice("A", kind=direction + "easy"),
                choice("B", kind=direction + "medium"),
                choice("a.", kind=direction + "hard"),
                choice("C", kind="route_planning"),
                number("150"),
                number("about 100", kind="room_size_estimation"),
            ]
        ),
    )
    averaged = {
        "object_rel_direction": 2 / 3,
        "route_planning": 0,
        "object_counting": 0.1,
        "room_size_estimation": 0,
    }
    assert summary["averaged"] == pytest.approx(averaged)
    assert summary["score"] == pytest.approx(sum(averaged.values()) / 4)
    assert summary["groups"]["question_type"][direction + "easy"] == {"score": 1, "n": 2}
    assert summary["unparsed"] == 1


def test_mean_is_over_the_types_that_are_there_and_says_which_are_not():
    summary = score_rows(
        "vsibench",
        "videonsa",
        placed([choice("A", kind="object_rel_direction_easy"), number("no", truth="3")]),
    )
    assert summary["score"] == 0.5
    assert summary["types_present"] == ["object_counting", "object_rel_direction_easy"]
    assert len(summary["types_absent"]) == 8
    assert "object_rel_direction_hard" in summary["types_absent"]


def test_wordy_number_counts_at_lmms_head_only():
    rows = placed([number("There are three.", truth="3")])
    scores = {profile: score_rows("vsibench", profile, rows)["score"] for profile in PROFILES}
    assert scores == {"videonsa": 0, "lmms_head": 1, "author": 0}


def test_ground_truth_zero_is_counted():
    rows = placed([number("0", truth="0"), number("1", truth="0.0"), number("1", truth="1")])
    summary = score_rows("vsibench", "author", rows)
    assert summary["n_zero_truth"] == 2
    assert summary["score"] == pytest.approx(2 / 3)


def test_random_fallback_leaves_numbers_wrong():
    rows = placed([choice("?"), choice("?", "B"), number("?")])
    summary = score_rows("vsibench", "author", rows, fallback="random")
    assert (summary["unparsed"], summary["n_fallback"]) == (3, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (choice("A", kind="counting"), "question_type='counting' must be one of object_rel_dir"),
        (choice("A", truth="E"), "ground_truth='E' must be one of A, B, C, D"),
        (number("1", truth="many"), "ground_truth='many' of object_counting must be a number"),
        (number("1", kind="route_planning"), "options of route_planning must be a list"),
    ],
)
def test_wrong_value_is_named(row, message):
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: {message}"):
        score_rows("vsibench", "author", placed([row]))
