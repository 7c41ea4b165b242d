"""One row per question, whatever interrupts the evaluation and whatever is wrong with a video."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from tests import bad_decoders, evaluators
from videonsa_jax.config.schema import EvalConfig
from videonsa_jax.data import references
from videonsa_jax.errors import UserError
from videonsa_jax.evaluation import tasks
from videonsa_jax.evaluation.results import ResultFile
from videonsa_jax.evaluation.runner import Evaluator, evaluate
from videonsa_jax.evaluation.task import Task

COUNT = 10  # groups of 4, 4 and 2


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluator")
    return evaluators.build(folder, evaluators.write_clips(folder, COUNT))


@pytest.fixture(scope="module")
def questions(evaluator):
    return tasks.load("needle", evaluator.data.source[0])


@pytest.fixture(scope="module")
def whole(evaluator, questions, tmp_path_factory):
    """The folder of an evaluation that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    evaluate(evaluator, questions, task="needle", out=out)
    return out


def rows_of(folder):
    with (folder / "needle.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_rows_say_what_was_asked_seen_and_answered(whole, questions):
    rows = rows_of(whole)
    assert [row["id"] for row in rows] == [q.id for q in questions]
    for row, question in zip(rows, questions, strict=True):
        assert row["prompt"] == question.prompt
        assert row["answer"] == question.answer
        assert row["correct"] == (row["parsed"] == row["answer"])
        (frames,) = row["frames"]
        assert frames["seconds"] == [i / 8 for i in range(16)]
        assert frames["count"] == 16


def test_summary_agrees_with_the_rows(whole, evaluator):
    summary = json.loads((whole / "needle_summary.json").read_text())
    rows = rows_of(whole)
    assert summary["n"] == summary["kinds"]["first"]["n"] == COUNT
    assert summary["accuracy"] == sum(row["correct"] for row in rows) / COUNT
    assert summary["chance"] == 0.25
    assert summary["attention"] == "paper"
    assert summary["settings"] == evaluator.settings


def test_interrupted_evaluation_continues_to_the_same_rows(whole, evaluator, questions, tmp_path):
    groups = []

    class Killed(Evaluator):
        def answer(self, samples):
            if groups:
                raise KeyboardInterrupt
            groups.append(len(samples))
            return super().answer(samples)

    fields = {f.name: getattr(evaluator, f.name) for f in dataclasses.fields(Evaluator)}
    with pytest.raises(KeyboardInterrupt):
        evaluate(Killed(**fields), questions, task="needle", out=tmp_path)
    assert len(rows_of(tmp_path)) == 4
    assert not (tmp_path / "needle_summary.json").exists()
    evaluate(evaluator, questions, task="needle", out=tmp_path)
    name = "needle.jsonl"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_torn_last_line_is_asked_again(whole, evaluator, questions, tmp_path):
    data = (whole / "needle.jsonl").read_bytes()
    end_of_second = data.index(b"\n", data.index(b"\n") + 1) + 1
    (tmp_path / "needle.jsonl").write_bytes(data[: end_of_second + 40])
    evaluate(evaluator, questions, task="needle", out=tmp_path)
    assert (tmp_path / "needle.jsonl").read_bytes() == data


def test_finished_evaluation_is_not_repeated(whole, evaluator, questions):
    class Idle(Evaluator):
        def answer(self, samples):
            raise AssertionError("asked again")

    fields = {f.name: getattr(evaluator, f.name) for f in dataclasses.fields(Evaluator)}
    assert evaluate(Idle(**fields), questions, task="needle", out=whole)["n"] == COUNT


def test_answers_do_not_depend_on_the_batch(whole, evaluator, questions, tmp_path):
    alone = dataclasses.replace(evaluator, cfg=EvalConfig(batch=1, max_new_tokens=4))
    evaluate(alone, questions[:3], task="needle", out=tmp_path)
    generated = [row["generated"] for row in rows_of(tmp_path)]
    assert generated == [row["generated"] for row in rows_of(whole)[:3]]


def test_unusable_samples_are_rows_that_count_as_wrong(evaluator, questions, tmp_path):
    video = tmp_path / "cut.mp4"
    video.write_bytes((questions[0].file.parent / questions[0].record["video"]).read_bytes()[:600])
    changes = ({"video": str(video)}, {"video": "nowhere.mp4"}, {"video": None}, {})
    asked = [
        dataclasses.replace(q, record={**q.record, **change})
        for q, change in zip(questions, changes, strict=False)
    ]
    turn = {"from": "human", "value": "<video>\n" + "long " * 100}
    asked.append(
        dataclasses.replace(questions[4], record={**questions[4].record, "conversations": [turn]})
    )
    summary = evaluate(evaluator, asked, task="needle", out=tmp_path)
    assert (summary["n"], summary["n_failed"]) == (5, 4)
    errors = [row.get("error") for row in rows_of(tmp_path)]
    assert "cut.mp4" in errors[0]
    assert "nowhere.mp4: no such file" in errors[1]
    assert questions[2].id in errors[2]
    assert errors[3] is None
    assert "text slots" in errors[4]
    assert all("\n" not in error for error in errors if error)


def test_videos_that_hang_crash_or_raise_count_as_wrong_and_are_not_tried_again(
    evaluator, questions, tmp_path, monkeypatch
):
    monkeypatch.setattr(references, "VideoFile", bad_decoders.video_file)
    bad = ["read-abort", "read-hang", "read-disk"]
    videos = [str(tmp_path / f"{name}.mp4") for name in bad]
    asked = [
        dataclasses.replace(q, record={**q.record, "video": video})
        for q, video in zip(questions, videos, strict=False)
    ] + list(questions[3:5])
    limited = dataclasses.replace(
        evaluator, data=dataclasses.replace(evaluator.data, decode_timeout_s=3)
    )
    out = tmp_path / "out"
    summary = evaluate(limited, asked, task="needle", out=out)
    assert (summary["n"], summary["n_failed"]) == (5, 3)
    errors = [row.get("error") for row in rows_of(out)]
    assert errors[3:] == [None, None]
    for error, part in zip(
        errors, ("SIGABRT", "data.decode_timeout_s=3", "OSError: "), strict=False
    ):
        assert part in error
    assert sorted(bad_decoders.listed(out / "bad_samples.jsonl")) == sorted(bad)

    (out / "needle.jsonl").unlink()
    again = evaluate(limited, asked, task="needle", out=out)
    assert again["accuracy"] == summary["accuracy"]
    assert [row.get("error") for row in rows_of(out)] == errors
    assert [bad_decoders.tries(v) for v in videos] == [["read"], ["read"], ["read", "read"]]


def test_text_that_is_no_unicode_costs_its_question_only(evaluator, questions, tmp_path):
    video = {**questions[0].record, "video": "\ud800.mp4"}
    turn = {"from": "human", "value": "<video>\n\ud800"}
    text = {**questions[1].record, "conversations": [turn]}
    asked = [
        dataclasses.replace(questions[0], record=video),
        dataclasses.replace(questions[1], record=text),
        questions[2],
    ]
    summary = evaluate(evaluator, asked, task="needle", out=tmp_path)
    assert summary["n_failed"] == 2
    assert [row["id"] for row in rows_of(tmp_path)] == [q.id for q in asked]
    assert evaluate(evaluator, asked, task="needle", out=tmp_path)["n"] == 3


def test_full_disk_ends_the_evaluation(evaluator, questions, tmp_path, monkeypatch):
    def append(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ResultFile, "append", append)
    with pytest.raises(OSError, match="No space left"):
        evaluate(evaluator, questions[:1], task="needle", out=tmp_path)


def test_rows_of_other_settings_are_refused(whole, evaluator, questions):
    other = dataclasses.replace(evaluator, checkpoint="another step")
    with pytest.raises(UserError, match="written with other settings"):
        evaluate(other, questions, task="needle", out=whole)


def test_blind_examiner_sees_the_mean_colour(evaluator, questions):
    blind = dataclasses.replace(evaluator, blind=True)
    seen, blank = evaluator.load(questions[0]), blind.load(questions[0])
    np.testing.assert_array_equal(seen.tokens, blank.tokens)
    assert seen.visuals[0].patches.any()
    assert not blank.visuals[0].patches.any()
    assert blind.settings != evaluator.settings


def test_a_task_from_outside_is_asked_scored_and_summed_up_its_own_way(
    evaluator, questions, tmp_path, monkeypatch
):
    def prompt(question):
        (asked,) = question.record["conversations"]
        asked = {**asked, "value": asked["value"] + "\nAnswer with a number."}
        return {**question.record, "conversations": [asked]}

    def load(path):
        question = dataclasses.replace(
            questions[0], answer="4", options=(), file=pathlib.Path(path)
        )
        return [question, question]

    toy = Task(
        load=load,
        prompt=prompt,
        score=lambda generated, question: (generated, 1 - abs(int(generated) - 4) / 10),
        aggregate=lambda rows: {"worst": min(row["correct"] for row in rows)},
    )
    monkeypatch.setitem(tasks.TASKS, "counting", toy)

    class TwoThenFour(Evaluator):
        def answer(self, samples):
            assert len(samples) == 2
            return ["2", "4"]

    fields = {f.name: getattr(evaluator, f.name) for f in dataclasses.fields(Evaluator)}
    asked = tasks.load("counting", questions[0].file)
    assert [question.id for question in asked] == [questions[0].id, f"{questions[0].id}#1"]
    assert asked[0].prompt.endswith("Answer with a number.")
    summary = evaluate(TwoThenFour(**fields), asked, task="counting", out=tmp_path)
    assert summary["worst"] == 0.8
    assert summary["accuracy"] == 0.9
