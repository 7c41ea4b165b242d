"""The evaluation program, from a folder of weights to a summary."""

import dataclasses
import errno
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from flax import nnx

import eval as program
from tests import evaluators
from videonsa_jax.config.run import RunConfig
from videonsa_jax.config.schema import ComputeConfig, EvalConfig, OptimConfig, TrainConfig
from videonsa_jax.errors import UserError
from videonsa_jax.evaluation import results
from videonsa_jax.sharding.mesh_config import MeshConfig
from videonsa_jax.training import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def evaluator(folder):
    evaluator = evaluators.build(folder, evaluators.write_clips(folder, 6))
    params = nnx.to_pure_dict(nnx.state(evaluator.model, nnx.Param))
    checkpoint.save_params(folder / "weights", params, evaluator.model.cfg)
    return evaluator


@pytest.fixture(scope="module")
def cfg(evaluator):
    return RunConfig(
        model=evaluator.model.cfg,
        data=evaluator.data,
        optim=OptimConfig(),
        train=TrainConfig(steps=1),
        compute=ComputeConfig(dtype="float32", remat="none"),
        eval=EvalConfig(tasks=(("needle", evaluator.data.source[0]),), batch=4, max_new_tokens=4),
    )


def run(cfg, folder, out, **changes):
    devices = jax.devices()[:1]
    return program.run(cfg, str(folder / "weights"), ["needle"], out, devices=devices, **changes)


def rows_of(folder):
    with (folder / "needle.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_program_answers_as_the_model_in_memory_does(cfg, folder, evaluator, tmp_path):
    (summary,) = run(cfg, folder, tmp_path)
    assert summary["n"] == 6
    assert summary["checkpoint"].endswith("weights step 0")
    questions = program.setup.load_questions(cfg, "needle")
    generated = evaluator.answer([evaluator.load(question) for question in questions[:4]])
    assert generated == [row["generated"] for row in rows_of(tmp_path)[:4]]
    assert "accuracy" in program.describe(summary)


def test_limit_can_be_raised_later(cfg, folder, tmp_path):
    assert run(cfg, folder, tmp_path, limit=2)[0]["n"] == 2
    first = rows_of(tmp_path)
    assert run(cfg, folder, tmp_path)[0]["n"] == 6
    assert rows_of(tmp_path)[:2] == first


def test_answers_do_not_depend_on_the_mesh(cfg, folder, tmp_path):
    run(cfg, folder, tmp_path / "one")
    eight = dataclasses.replace(cfg, mesh=MeshConfig(data=2, fsdp=4))
    program.run(eight, str(folder / "weights"), ["needle"], tmp_path / "eight")
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "eight")


def test_checkpoint_of_another_model_is_refused(cfg, folder, tmp_path):
    text = dataclasses.replace(cfg.model.text, d_ff=32)
    other = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, text=text))
    with pytest.raises(UserError, match="is a checkpoint of another model"):
        run(other, folder, tmp_path)


def test_a_full_disk_is_one_line(cfg, folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(results.ResultFile, "append", full)
    with pytest.raises(UserError, match=r"No space left on device \(.* the same command goes on$"):
        run(cfg, folder, tmp_path)


def test_task_without_a_file_says_which_field_to_set(cfg, folder, tmp_path):
    with pytest.raises(UserError, match=r"write --config\.eval\.tasks\.needle=PATH"):
        run(dataclasses.replace(cfg, eval=EvalConfig()), folder, tmp_path)


def test_missing_tokenizer_is_named(cfg, folder, tmp_path):
    data = dataclasses.replace(cfg.data, tokenizer=str(tmp_path))
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        run(dataclasses.replace(cfg, data=data), folder, tmp_path)


def test_command_line_reports_a_wrong_field_in_one_line(tmp_path):
    command = [
        sys.executable,
        "eval.py",
        "--config=configs/videonsa_7b_sft.py:smoke",
        "--checkpoint=nowhere",
        "--task=needle",
        f"--out={tmp_path}",
        "--config.eval.bach=3",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("eval.py: unknown field config.eval.bach; did you mean")
    assert done.stderr.count("\n") == 1
