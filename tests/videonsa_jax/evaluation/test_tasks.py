"""Files of questions -> what is asked and what is right; what is wrong with a file is one line."""

import codecs
import json
import pathlib
import string

import pytest

from tests import evaluators
from videonsa_jax.data.chat import VIDEO
from videonsa_jax.data.records import parse_record
from videonsa_jax.errors import UserError
from videonsa_jax.evaluation import tasks

RECORD = {
    "id": "clip1",
    "data_source": "academic",
    "video": "clip1.mp4",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?\nA. a dog\nB. a cat\nSay the letter."},
        {"from": "gpt", "value": "B. a cat"},
        {"from": "human", "value": "And then?\n(A) rain\n(B) sun\n(C) snow"},
        {"from": "gpt", "value": "C"},
    ],
}
NEEDLE = {**RECORD, "answer": "B", "options": ["a dog", "a cat"], "kind": "first"}


def write(path, records):
    path.write_text(json.dumps(records))
    return path


def test_needle_asks_what_the_generated_file_says(tmp_path):
    questions = tasks.load("needle", evaluators.write_clips(tmp_path, 4))
    assert sorted(q.answer for q in questions) == ["A", "B", "C", "D"]
    assert {q.kind for q in questions} == {"first"}
    for question in questions:
        assert len(question.options) == 4
        assert f"{question.answer}. " in question.prompt
        assert [turn["from"] for turn in question.record["conversations"]] == ["human"]


def test_mcq_asks_each_turn_by_itself_with_the_video(tmp_path):
    first, second = tasks.load("mcq", write(tmp_path / "q.json", [RECORD]))
    assert (first.id, first.answer, first.options) == ("clip1#0", "B", ("a dog", "a cat"))
    assert (second.id, second.answer, second.options) == ("clip1#1", "C", ("rain", "sun", "snow"))
    assert second.prompt == "<image>\nAnd then?\n(A) rain\n(B) sun\n(C) snow"
    assert first.kind == "academic"


def test_jsonl_is_read_line_by_line(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(RECORD) + "\n\n" + json.dumps({**RECORD, "id": "clip2"}) + "\n")
    assert [q.id for q in tasks.load("mcq", path)] == ["clip1#0", "clip1#1", "clip2#0", "clip2#1"]


def choices(count: int) -> str:
    """A question with `count` options."""
    lines = [f"{letter}. option {letter}" for letter in string.ascii_uppercase[:count]]
    return "\n".join(["<image>", "Which?", *lines, "Please respond with only the letter."])


def ask(question: str, answer: str, *system: str) -> dict:
    turns = [{"from": "system", "value": text} for text in system]
    turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "v", "video": "v.mp4", "conversations": turns}


@pytest.mark.parametrize("count", [2, 6, 7, 10, 26])
def test_mcq_takes_any_number_of_options(tmp_path, count):
    last = string.ascii_uppercase[count - 1]
    (question,) = tasks.load("mcq", write(tmp_path / "q.json", [ask(choices(count), last)]))
    assert (len(question.options), question.answer) == (count, last)
    assert question.options[-1] == f"option {last}"


def test_lines_that_only_look_like_options_are_not_counted(tmp_path):
    text = "Q: Who says it?\nA: I do.\nB: No.\nI. Newton wrote:\nA. Ann\nB. Bob\nC. Cy\nE. so"
    (question,) = tasks.load("mcq", write(tmp_path / "q.json", [ask(text, "C")]))
    assert question.options == ("Ann", "Bob", "Cy")


def test_mcq_numbers_the_questions_of_a_repeated_id(tmp_path):
    records = [ask(choices(4), letter) for letter in "ABC"]
    questions = tasks.load("mcq", write(tmp_path / "q.json", records))
    assert [(q.id, q.answer) for q in questions] == [("v", "A"), ("v#1", "B"), ("v#2", "C")]
    taken = [{**RECORD, "id": "v"}, *records[:2], {**records[2], "id": "v#1"}]
    ids = [q.id for q in tasks.load("mcq", write(tmp_path / "q.json", taken))]
    assert ids == ["v#0", "v#1", "v", "v#2", "v#1#1"]


def test_mcq_keeps_the_system_turn_as_the_system_prompt(tmp_path):
    record = ask(choices(4), "A. option A", "Answer with one letter.")
    record["conversations"] += ask(choices(3).removeprefix("<image>\n"), "C")["conversations"]
    first, second = tasks.load("mcq", write(tmp_path / "q.json", [record]))
    assert (first.id, first.answer, second.id, second.answer) == ("v#0", "A", "v#1", "C")
    for question in (first, second):
        system, user = parse_record(question.record, question.name, pathlib.Path()).messages
        assert (system.role, system.text) == ("system", "Answer with one letter.")
        assert (user.role, user.text.count(VIDEO)) == ("user", 1)
        assert "Which?" in question.prompt


@pytest.mark.parametrize("lines", [False, True])
def test_byte_order_mark_is_passed_over(tmp_path, lines):
    path = tmp_path / "q.json"
    texts = [json.dumps({**RECORD, "id": name}).encode() for name in ("a", "b")]
    data = b"\n".join(codecs.BOM_UTF8 + text for text in texts)
    if not lines:
        data = codecs.BOM_UTF8 + b"[" + b",".join(texts) + b"]"
    path.write_bytes(data)
    assert [q.id for q in tasks.load("mcq", path)] == ["a#0", "a#1", "b#0", "b#1"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_other_encodings_are_refused(tmp_path, encoding):
    path = tmp_path / "q.json"
    path.write_text(json.dumps([RECORD]), encoding=encoding)
    with pytest.raises(UserError, match=r"q.json: is UTF-16 or UTF-32"):
        tasks.load("mcq", path)


def without(name):
    return {key: value for key, value in RECORD.items() if key != name}


@pytest.mark.parametrize(
    ("task", "text", "reason"),
    [
        ("mcq", "[]", "has no questions"),
        ("mcq", '{"id": 1}\n{"id": ', "q.json:2: not JSON"),
        ("mcq", json.dumps([without("conversations")]), "'clip1' has no field 'conversations'"),
        ("mcq", json.dumps([RECORD, 7]), r"q.json\[1\]: a record must be a JSON object, not int"),
        ("mcq", json.dumps([ask("What?", "A")]), "'v', turn 0: not a multiple-choice question"),
        ("mcq", json.dumps([ask(choices(4), "H")]), "'v', turn 0: not a multiple-choice question"),
        ("mcq", json.dumps([ask(choices(2), "D")]), "'v', turn 0: not a multiple-choice question"),
        (
            "mcq",
            json.dumps([{"id": 1, "conversations": "A"}]),
            "1: 'conversations' must be of type",
        ),
        ("mcq", json.dumps([{"id": 1, "conversations": ["A"]}]), "1: each turn must be an object"),
        ("needle", json.dumps([RECORD]), "'clip1' has no field 'answer'"),
        ("needle", json.dumps([{**NEEDLE, "conversations": None}]), "must be of type list, not N"),
        ("needle", json.dumps([{**NEEDLE, "conversations": [{}, {}]}]), "each turn must be an obj"),
        ("needle", json.dumps([{**NEEDLE, "conversations": []}]), "has no question and answer"),
        ("needle", json.dumps([{**NEEDLE, "options": None}]), "'options' must be of type list"),
        ("needle", json.dumps([{**NEEDLE, "answer": 1}]), "'answer' must be of type str, not int"),
        (
            "mcq",
            json.dumps([{**RECORD, "conversations": [{"value": "Why?"}, {"value": "So."}]}]),
            "'clip1', turn 0: not a multiple-choice question",
        ),
        ("neddle", "[]", "--task=neddle must be one of mcq, needle"),
    ],
)
def test_bad_file_is_named_with_the_reason(tmp_path, task, text, reason):
    path = tmp_path / "q.json"
    path.write_text(text)
    with pytest.raises(UserError, match=reason):
        tasks.load(task, path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
        tasks.load("mcq", tmp_path / "nowhere.json")
