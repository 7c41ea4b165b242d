"""Every verb writes its table, its picture and its summary, and they agree."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests import evaluators
from videonsa_jax.analysis import __main__ as program
from videonsa_jax.analysis import attended, frames, gates, loss, selection
from videonsa_jax.config.schema import NSAConfig
from videonsa_jax.errors import UserError
from videonsa_jax.evaluation import tasks
from videonsa_jax.training import checkpoint


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluator")
    return evaluators.build(folder, evaluators.write_clips(folder, 2))


@pytest.fixture(scope="module")
def questions(evaluator):
    return tasks.load("needle", evaluator.data.source[0])


def table_of(out, name):
    with Image.open(out / f"{name}.png") as image:
        assert min(image.size) > 200
    with (out / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def summary_of(out, name):
    return json.loads((out / f"{name}.json").read_text())


def write_run(folder, losses):
    folder.mkdir()
    rows = [{"step": 5 * i, "loss": x, "accuracy": 0.5} for i, x in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_loss_compares_runs(tmp_path):
    runs = {
        "nsa": write_run(tmp_path / "a", [3.0, None, 1.0]),
        "dense": write_run(tmp_path / "b", [2.0, 0.5]),
    }
    summary = loss.curves(runs, tmp_path / "out")
    assert summary["nsa"] == {"rows": 2, "last_step": 15, "loss_first": 3.0, "loss_last": 1.0}
    assert summary_of(tmp_path / "out", "loss") == summary
    assert [row["loss"] for row in table_of(tmp_path / "out", "loss")] == [
        "3.0",
        "1.0",
        "2.0",
        "0.5",
    ]


def test_loss_of_a_folder_without_metrics_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"analysis loss: .*metrics\.jsonl: no rows"):
        program.main(["loss", str(tmp_path), f"--out={tmp_path}"])


def test_gates_are_averaged_over_tokens_and_heads(evaluator, questions, tmp_path):
    samples = [evaluator.load(question) for question in questions]
    summary = gates.profile(evaluator, samples, tmp_path)
    assert summary["vision_tokens"] == 2 * evaluators.VISION_TOKENS
    rows = table_of(tmp_path, "gates")
    assert [(row["layer"], row["branch"]) for row in rows] == [
        (layer, branch) for layer in "01" for branch in ("cmp", "slc", "swa")
    ]
    for row in rows:
        assert 0 < float(row["quartile_1"]) <= float(row["quartile_3"]) < 1
        assert float(row["mean"]) == summary["mean"][row["branch"]][int(row["layer"])]


def test_gates_equal_their_biases_where_nothing_else_counts(evaluator, questions, tmp_path):
    model = evaluator.model
    out = model.text.layers.gates.out
    kernel, bias = out.kernel[...], out.bias[...]
    out.kernel[...], out.bias[...] = 0 * kernel, 0 * bias + 0.3 * np.log(3.0)
    summary = gates.profile(evaluator, [evaluator.load(questions[0])], tmp_path)
    out.kernel[...], out.bias[...] = kernel, bias
    np.testing.assert_allclose(list(summary["mean"].values()), 0.75, atol=1e-6)
    for row in table_of(tmp_path, "gates"):
        assert abs(float(row["quartile_1"]) - 0.75) <= 1e-3
        assert abs(float(row["quartile_3"]) - 0.75) <= 1e-3


def test_selection_counts_what_the_layers_select(evaluator, questions, tmp_path):
    summary = selection.strip(evaluator, questions[0], tmp_path)
    assert summary["id"] == questions[0].id
    assert summary["selected_pairs_counted"] == [summary["selected_pairs"]] * 2
    rows = table_of(tmp_path, "selection")
    assert len(rows) == 2 * evaluators.VISION_TOKENS // 4
    by_last = [float(row["by_last"]) for row in rows if row["layer"] == "0"]
    assert by_last[-1] == 1  # the last frames' own block
    assert sum(by_last) == pytest.approx(2)  # block_count


def test_selection_of_an_unreadable_video_is_one_line(evaluator, questions, tmp_path):
    record = {**questions[0].record, "video": "nowhere.mp4"}
    with pytest.raises(UserError, match=r"nowhere\.mp4: no such file"):
        selection.strip(evaluator, dataclasses.replace(questions[0], record=record), tmp_path)


def test_frames_come_back_from_patches(evaluator, questions):
    sample = evaluator.load(questions[0])
    steps = frames.steps(sample, evaluator.model.cfg.vision)
    assert [step.seconds for step in steps] == [i / 4 for i in range(8)]
    assert {step.tokens for step in steps} == {4}
    images = frames.unpatchify(sample.visuals[0], evaluator.model.cfg.vision)
    np.testing.assert_array_equal(images[::2], [step.image for step in steps])
    again = frames.processor.patchify(images, evaluator.model.cfg.vision)
    np.testing.assert_allclose(again, sample.visuals[0].patches, atol=1e-5)


def test_command_line_draws_a_checkpoint(evaluator, questions, tmp_path):
    params = nnx.to_pure_dict(nnx.state(evaluator.model, nnx.Param))
    checkpoint.save_params(tmp_path / "weights", params, evaluator.model.cfg)
    common = [
        f"--config={evaluators.write_config(tmp_path / 'config.py', evaluator)}",
        "--config.mesh.data=8",
        f"--out={tmp_path}",
    ]
    opened = [*common, f"--checkpoint={tmp_path / 'weights'}"]
    program.main(["selection", *opened, f"--question={questions[1].id}"])
    assert summary_of(tmp_path, "selection")["id"] == questions[1].id
    program.main(["gates", *opened, "--limit=1"])
    assert summary_of(tmp_path, "gates")["samples"] == 1
    program.main(["attended", *common, "--tokens", "64", "128"])
    assert len(table_of(tmp_path, "attended")) == 2


def test_attended_writes_one_row_per_length(tmp_path):
    nsa = NSAConfig()
    attended.curve([1024, 4096], nsa, tmp_path)
    rows = table_of(tmp_path, "attended")
    fractions = [float(row["all"]) for row in rows]
    assert fractions == [attended.attended_fraction(n, nsa) for n in (1024, 4096)]
    assert summary_of(tmp_path, "attended")["nsa"]["block_count"] == 32
