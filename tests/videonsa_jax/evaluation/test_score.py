"""The program that scores stored answers: without JAX, and with one line where it cannot."""

import json
import subprocess
import sys

import pytest

from videonsa_jax.evaluation import score

GOOD = {"task_type": "needle", "answer": "B", "generated": "B"}


@pytest.fixture
def write(tmp_path):
    def to_file(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
        return path

    return to_file


def run(path, *flags, task="mlvu", profile="videonsa"):
    score.main([f"--task={task}", f"--profile={profile}", str(path), *flags])


def test_program_prints_and_writes_the_summary_without_jax(write, tmp_path):
    path = write(GOOD, {**GOOD, "task_type": "ego", "generated": "A."})
    code = (
        "import sys; from videonsa_jax.evaluation import score; score.main(sys.argv[1:]); "
        "assert not {'jax', 'flax', 'torch'} & sys.modules.keys()"
    )
    out = tmp_path / "summary.json"
    flags = ["--task=mlvu", "--profile=videonsa", str(path), f"--out={out}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], check=True, capture_output=True, text=True
    )
    summary = json.loads(done.stdout)
    assert summary == json.loads(out.read_text())
    expected = {
        "task": "mlvu",
        "profile": "videonsa",
        "parser_version": "character_before_parenthesis.1",
        "n": 2,
        "unparsed": 1,
        "score": pytest.approx(1 / 7),
        "fallback": "wrong",
        "n_fallback": 0,
        "seed": 0,
        "n_failed": 0,
        "types_present": ["ego", "needle"],
    }
    assert {name: summary[name] for name in expected} == expected


def test_list_of_rows_is_read_too(write, capsys):
    run(write(json.dumps([GOOD, GOOD]), name="rows.json"))
    assert json.loads(capsys.readouterr().out)["n"] == 2


def test_question_that_could_not_be_asked_is_wrong_and_never_guessed(write, capsys):
    lost = {"task_type": "needle", "answer": "B", "generated": None, "error": "no such file"}
    run(write(GOOD, {**lost, "candidates": ["a"]}), "--fallback=random")
    summary = json.loads(capsys.readouterr().out)
    assert (summary["n"], summary["n_failed"], summary["unparsed"]) == (2, 1, 0)
    assert summary["groups"]["task_type"]["needle"]["score"] == 0.5


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([GOOD], {"task": "mmlu"}, r"--task=mmlu must be one of longvideobench, mlvu, .*vsibench"),
        ([GOOD], {"profile": "paper"}, r"--profile=paper must be one of videonsa, lmms_head, aut"),
        ([], {}, r"rows\.jsonl: holds no row"),
        (["\n\n"], {}, r"rows\.jsonl: holds no row"),
        ([GOOD, "A, B\n"], {}, r"rows\.jsonl:2: not JSON"),
        ([GOOD, "3\n"], {}, r"rows\.jsonl:2: a record must be a JSON object, not int"),
        ([GOOD], {"task": "tomato"}, r":1: has no column 'options', .* looks like a row of mlvu"),
        ([GOOD, {"answer": "B"}], {}, r":2: has no column 'task_type', which mlvu needs$"),
        ([GOOD, {**GOOD, "answer": 1}], {}, r":2: column 'answer' must be str, not 1"),
        ([{"task_type": "ego", "answer": "B"}], {}, r":1: column 'generated', .* is missing"),
        ([{**GOOD, "generated": ["B"]}], {}, r":1: column 'generated', .* not \['B'\]"),
        ([{**GOOD, "generated": None}], {}, r":1: column 'generated', .* not None"),
    ],
)
def test_wrong_input_is_one_line(write, rows, flags, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        run(write(*rows), **flags)
    assert "\n" not in stopped.value.code  # a text: printed, and exit code 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--fallback=guess", "--fallback=guess must be one of wrong, random"),
        ("--fallback=", "--fallback= must be one of wrong, random"),
        ("--seed=one", "--seed=one must be a whole number"),
        ("--out={folder}/none/out.json", "none/out.json.*No such file or directory; choose anoth"),
        ("--out={rows}", r"--out=.*rows\.jsonl would overwrite the rows"),
    ],
)
def test_wrong_flag_is_one_line(write, tmp_path, flag, message):
    path = write(GOOD)
    with pytest.raises(SystemExit, match=message):
        run(path, flag.format(folder=tmp_path, rows=path))
    assert path.read_text() == json.dumps(GOOD) + "\n"


def test_missing_file_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"none\.jsonl: no such file"):
        run(tmp_path / "none.jsonl")
