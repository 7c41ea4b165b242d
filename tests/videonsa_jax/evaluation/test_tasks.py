"""Files of questions -> what is asked and what is right; what is wrong with a file is one line."""

import json

import pytest

from tests import examiners
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


def write(path, records):
    path.write_text(json.dumps(records))
    return path


def test_needle_asks_what_the_generated_file_says(tmp_path):
    questions = tasks.load("needle", examiners.write_clips(tmp_path, 4))
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


def without(name):
    return {key: value for key, value in RECORD.items() if key != name}


@pytest.mark.parametrize(
    ("task", "text", "reason"),
    [
        ("mcq", "[]", "has no questions"),
        ("mcq", '{"id": 1}\n{"id": ', "q.json:2: not JSON"),
        ("mcq", json.dumps([without("conversations")]), "'clip1' has no field 'conversations'"),
        ("mcq", json.dumps([RECORD, RECORD]), "two questions have the id 'clip1#0'"),
        ("needle", json.dumps([RECORD]), "'clip1' has no field 'answer'"),
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
