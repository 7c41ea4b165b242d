"""The first letter: LongVideoBench to E, TimeScope to F, LongTimeScope with two glued phrases.

The expected letters were worked out by hand from the benchmarks' published rules.
"""

import pytest

from videonsa_jax.evaluation.benchmarks import BENCHMARKS
from videonsa_jax.evaluation.benchmarks.benchmark import PROFILES, Item

ITEM = Item(answer="A", groups={}, options=("a", "b", "c", "d"))
PROSE = "the person in the video walks over to the red chair slowly"
GOLDEN = [  # generated text, LongVideoBench, TimeScope, LongTimeScope
    ("", None, None, None),
    ("A", "A", "A", "A"),
    ("A.", "A", "A", "A"),
    ("(B) a red car", "B", "B", "B"),
    ("The answer is C", "C", "C", "C"),
    ("Best option: (D)", "D", "D", "B"),
    ("b", None, None, None),
    ("the answer is b", None, None, None),
    ("the answer is B", "B", "B", "B"),
    ("E", "E", "E", "E"),
    ("F", None, "F", "F"),
    ("E. five", "E", "E", "E"),
    ("three", None, None, None),
    ("3.0 meters", None, None, None),
    ("Answer: B", "A", "A", "A"),
    ("Best answer: C", "C", "C", "B"),
    ("The best answer is C", "C", "C", "C"),
    ("The correct answer is D.", "D", "D", "D"),
    ("The best option is E", "E", "E", "E"),
    ("The correct option is A", "A", "A", "A"),
    ("The answer: C", "C", "C", "C"),
    ("The Answer is D", "A", "A", "A"),
    ("Best Option: D", "B", "B", "B"),
    ("Definitely C", "D", "D", "D"),
    ("I think it is C.", "C", "C", "C"),
    ("Option C", "C", "C", "C"),
    ("Choice B", "C", "C", "C"),
    ("Correct: B", "C", "C", "C"),
    ("None of them.", None, None, None),
    ("  D  ", "D", "D", "D"),
    ("\nB\n", "B", "B", "B"),
    ("(c)", None, None, None),
    ("**B**", "B", "B", "B"),
    ("<answer>D</answer>", "D", "D", "D"),
    ("\\boxed{E}", "E", "E", "E"),
    ("G", None, None, None),
    ("Frames show a dog", None, "F", "F"),
    ("Best answer:Best option: D", "D", "D", "D"),
    ("The best option isThe correct option is C", "C", "C", "C"),
    (PROSE, None, None, None),
    (PROSE.replace("slowly", "so B"), "B", "B", "B"),
    ("A dog runs away, so the answer must be the second one, B", "A", "A", "A"),
    ("The answer is The answer is B", "B", "B", "B"),
    ("Best option:\n(E)", "E", "E", "B"),
    ("\uff22", None, None, None),
    ("C/D", "C", "C", "C"),
    ("Both B and C", "B", "B", "B"),
    ("It is F or E", "E", "F", "F"),
    ("Answer", "A", "A", "A"),
    ("The answer", None, None, None),
]


@pytest.mark.parametrize(("text", "longvideobench", "timescope", "longtimescope"), GOLDEN)
@pytest.mark.parametrize("profile", PROFILES)
def test_first_letter_is_the_answer(profile, text, longvideobench, timescope, longtimescope):
    expected = {
        "longvideobench": longvideobench,
        "timescope": timescope,
        "longtimescope": longtimescope,
    }
    parsed = {name: BENCHMARKS[name].parsers[profile].parse(text, ITEM) for name in expected}
    assert parsed == expected
