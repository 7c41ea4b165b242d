"""Every step has one row, however often a run was killed."""

import json
import math

from tensorboardX.proto.event_pb2 import Event

from tests import synthetic
from videonsa_jax.batch import Batch
from videonsa_jax.training import metrics

SCALARS = {
    "loss": 2.0,
    "accuracy": 0.5,
    "grad_norm": 1.0,
    "lr": 1e-3,
    "tokens": 100,
    "skipped": 0,
    "consecutive_bad": 0,
}


def write_rows(workdir, restored, steps):
    writer = metrics.MetricWriter(workdir, restored)
    for step in steps:
        writer.write({"step": step, "loss": float(step)})
    writer.close()


def events(workdir):
    """(step, tag, value) of all event files, in the TFRecord framing."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            data = data[16 + length :]
    return found


def test_a_continued_run_drops_the_rows_after_its_checkpoint(tmp_path):
    write_rows(tmp_path, 0, range(1, 6))
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    write_rows(tmp_path, 3, (4,))
    assert [row["step"] for row in metrics.read_rows(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / metrics.FILE).read_text().count("\n") == 4


def test_tensorboard_files_hold_the_same_numbers(tmp_path):
    write_rows(tmp_path, 0, (1, 2))
    assert events(tmp_path) == [(1, "train/loss", 1.0), (2, "train/loss", 2.0)]


def test_a_report_averages_the_finite_steps_of_an_interval(tmp_path, capsys):
    with metrics.TrainLogger(tmp_path, 0, 4, active=True) as report:
        for step, loss in enumerate((1.0, math.nan, 3.0, math.nan), start=1):
            report.step(step, {**SCALARS, "loss": loss, "skipped": 1}, log=step in (3, 4))
    rows = [json.loads(line) for line in (tmp_path / metrics.FILE).read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(3, 2.0), (4, None)]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 3/4  loss 2.0000  accuracy 0.500  grad 1  lr 1.00e-03  ")
    assert "data wait 0%  ETA 0:00:00  skipped 1" in lines[0]
    assert "loss none" in lines[1]
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_compilation_is_told_and_not_counted_as_training(tmp_path, capsys):
    batch = Batch(**synthetic.batch(0, rows=2), frame_patches=synthetic.FRAME_PATCHES)
    with metrics.TrainLogger(tmp_path, 0, 1, active=True) as report:
        report.compiled(batch, seconds=1e6)
        report.step(1, SCALARS, log=True)
    (row,) = metrics.read_rows(tmp_path)
    assert row["tokens_per_s"] > 1  # 100 tokens in a million seconds would be fewer
    assert "compiled the step for 2 rows of 32 vision and 16 text tokens in 1000000.0 s" in (
        capsys.readouterr().out
    )


def test_a_row_tells_what_its_interval_spent_time_on(tmp_path, monkeypatch, capsys):
    now = iter(range(100))  # a second passes whenever the time is asked
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    with metrics.TrainLogger(tmp_path, 0, 2, active=True) as report:
        for step in (1, 2):
            for kind in ("data", "step", "step"):
                with report.timed(kind):
                    pass
            report.step(step, SCALARS, log=True)
    first, second = metrics.read_rows(tmp_path)
    assert (first["data_s"], first["step_s"], first["checkpoint_s"]) == (1, 2, 0)
    assert (second["data_s"], second["step_s"], second["compile_s"]) == (1, 2, 0)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "time spent: compile 0.0 s, data 2.0 s, step 4.0 s, checkpoint 0.0 s"


def test_other_processes_are_silent(tmp_path, capsys):
    with metrics.TrainLogger(tmp_path, 0, 2, active=False) as report:
        report.say("hello")
        report.step(1, SCALARS, log=True)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_the_console_line_tells_hours():
    row = {**SCALARS, "step": 7, "tokens_per_s": 12345.6, "data_wait": 0.031, "eta_s": 7384.0}
    line = metrics.console_line(row, 1000)
    assert line == (
        "step    7/1000  loss 2.0000  accuracy 0.500  grad 1  lr 1.00e-03  12,346 tokens/s  "
        "data wait 3%  ETA 2:03:04"
    )
