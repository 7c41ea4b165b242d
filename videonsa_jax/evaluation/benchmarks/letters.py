"""How LMMs-Eval finds the letter of an option in generated text."""

from collections.abc import Iterable

# Deleted before the first letter is looked for; in this order, which matters.
ANSWER_PHRASES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)

# What `ranked_letter` takes to announce an answer, in lower case.
_ANNOUNCEMENTS = (
    *("answer is", "the answer is", "my answer is", "choice is", "the choice is", "my choice is"),
    *("correct answer is", "the correct answer is", "best answer is", "the best answer is"),
    *("correct option is", "the correct option is", "best option is", "the best option is"),
    *("correct choice is", "the correct choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def first_letter(text: str, letters: str, phrases: Iterable[str] = ANSWER_PHRASES) -> str | None:
    """The first of these capital letters, be it in the middle of a word.

    So "Answer: B" is A. The original first gives up on more than ten words without such a letter,
    which is the same.
    """
    text = text.strip()
    for phrase in phrases:
        text = text.replace(phrase, "")
    return next((character for character in text if character in letters), None)


def strip_each(text: str, characters: str) -> str:
    """Strips all copies of one character, then of the next: of ".,A" with ",." the comma stays."""
    for character in characters:
        text = text.strip(character)
    return text


def ranked_letter(text: str, letters: str) -> str | None:
    """The letter in the most telling place; of several in places of one kind the last.

    Kinds of places, best first: in front of all, or at the very end, and no letter beside it; the
    letter's first occurrence after an announcement such as "the answer is"; "(X)", "X.", "X:",
    "X)", "X "; anywhere, be it in the middle of a word.
    """
    text = strip_each(text.strip(), ",.!?;:'\"")
    bare, text = text.strip(), f" {text} "
    if not bare:
        return None
    if bare[0] in letters and not bare[1:2].isalpha():
        return bare[0]
    if bare[-1] in letters and not bare[-2:-1].isalpha():
        return bare[-1]
    lower = text.lower()
    starts = [lower.find(phrase) + len(phrase) for phrase in _ANNOUNCEMENTS if phrase in lower]
    kinds = [[text.find(letter, start) for start in starts] for letter in letters]
    places = [
        (max(found, default=-1), letter) for found, letter in zip(kinds, letters, strict=True)
    ]
    if max(places)[0] >= 0:
        return max(places)[1]
    for form in ("({})", "{}.", "{}:", "{})", "{} ", "{}"):
        place, letter = max((text.rfind(form.format(letter)), letter) for letter in letters)
        if place >= 0:
            return letter
    return None
