"""What a run reports: console lines, `metrics.jsonl`, TensorBoard events, the loss curve."""

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import matplotlib.figure
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from videonsa_jax.batch import Batch

FILE = "metrics.jsonl"
KINDS = ("compile", "data", "step", "checkpoint")  # what a run spends time on


class TrainLogger:
    """Everything a run says about itself while it trains; silent on all processes but one.

    On a terminal a progress bar stands under the lines; in a file there are only lines.
    """

    def __init__(self, workdir: pathlib.Path, first: int, last: int, *, active: bool):
        """`first` is the step gone on from, `last` the run's length."""
        self._workdir, self._last, self._active = workdir, last, active
        self._writer = MetricWriter(workdir, first) if active else None
        bar_off = None if active else True  # None: off unless standard error is a terminal
        self._bar = tqdm(total=last, initial=first, disable=bar_off, leave=False, unit="step")
        self._spent = dict.fromkeys(KINDS, 0.0)
        self._restart()

    def _restart(self) -> None:
        self._steps: list[Mapping[str, Any]] = []
        self._before = dict(self._spent)
        self._started = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if any(self._spent.values()):
            spent = ", ".join(f"{kind} {self._spent[kind]:.1f} s" for kind in KINDS)
            self.say(f"time spent: {spent}")
        self._bar.close()
        if self._active:
            self._writer.close()
            plot_loss(self._workdir)

    def say(self, text: str) -> None:
        """One line, at once."""
        if self._active:
            self._bar.write(text)
            sys.stdout.flush()

    @contextlib.contextmanager
    def timed(self, kind: str):
        """What is done inside is time of one of `KINDS`."""
        begin = time.perf_counter()
        yield
        self._spent[kind] += time.perf_counter() - begin

    def compiled(self, batch: Batch, seconds: float) -> None:
        """A new shape of batch; the time does not count as training."""
        self._spent["compile"] += seconds
        (rows, text), vision = batch.text_tokens.shape, batch.vision_order.shape[1]
        self.say(
            f"compiled the step for {rows} rows of {vision} vision and {text} text tokens "
            f"in {seconds:.1f} s"
        )

    def step(self, step: int, scalars: Mapping[str, Any], *, log: bool) -> None:
        """One step's metrics; `log` closes the interval and writes its row."""
        self._steps.append(scalars)
        self._bar.update()
        if not log:
            return
        if self._active:
            row = self._row(step)
            self._writer.write(row)
            self.say(console_line(row, self._last))
        self._restart()

    def _row(self, step: int) -> dict[str, float | int | None]:
        """Means over the interval's finite steps (None: there is none); speed without compiling."""
        spent = {kind: self._spent[kind] - self._before[kind] for kind in KINDS}
        seconds = max(time.perf_counter() - self._started - spent["compile"], 1e-9)
        means = {
            name: _mean_of_finite([float(scalars[name]) for scalars in self._steps])
            for name in ("loss", "accuracy", "grad_norm")
        }
        return {
            "step": step,
            **means,
            "lr": float(self._steps[-1]["lr"]),
            "tokens_per_s": sum(int(scalars["tokens"]) for scalars in self._steps) / seconds,
            "data_wait": min(spent["data"] / seconds, 1.0),
            "eta_s": seconds / len(self._steps) * (self._last - step),
            "skipped": int(self._steps[-1]["skipped"]),
            **{f"{kind}_s": value for kind, value in spent.items()},
        }


def _mean_of_finite(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def console_line(row: Mapping[str, Any], steps: int) -> str:
    """One row for people."""

    def show(name, spec):
        return "none" if row[name] is None else format(row[name], spec)

    minutes, seconds = divmod(round(row["eta_s"]), 60)
    hours, minutes = divmod(minutes, 60)
    line = (
        f"step {row['step']:>{len(str(steps))}}/{steps}  loss {show('loss', '.4f')}  "
        f"accuracy {show('accuracy', '.3f')}  grad {show('grad_norm', '.3g')}  "
        f"lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tokens/s  "
        f"data wait {row['data_wait']:.0%}  ETA {hours}:{minutes:02}:{seconds:02}"
    )
    return line + (f"  skipped {row['skipped']}" if row["skipped"] else "")


class MetricWriter:
    """Appends rows to `metrics.jsonl` and to TensorBoard event files.

    A continued run starts by dropping the rows after the step it restored, and a half-written last
    line, so that each step has one row however often the run was killed.
    """

    def __init__(self, workdir: pathlib.Path, restored_step: int):
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / FILE
        rows = [row for row in read_rows(workdir) if row["step"] <= restored_step]
        _replace(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a")
        # Without the thread of `SummaryWriter`, which a full disk ends without a word to this one.
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._events = EventsWriter(str(workdir / "tensorboard" / "events"))
        restart = SessionLog(status=SessionLog.START)  # later events of earlier files are dropped
        self._write_event(restored_step + 1, session_log=restart)

    def close(self) -> None:
        """Closes both files."""
        with self._file:
            self._events.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """One row, on disk when this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and value is not None:
                self._write_event(row["step"], summary=summary.scalar(f"train/{name}", value))
        self._events.flush()

    def _write_event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))


def read_rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The complete rows of a run's metrics; none if there is no file yet."""
    path = workdir / FILE
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot_loss(workdir: pathlib.Path) -> None:
    """Writes `loss.png` from the run's metrics."""
    rows = [row for row in read_rows(workdir) if row["loss"] is not None]
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows])
    axes.set(xlabel="step", ylabel="loss (nats per target token)")
    axes.grid(alpha=0.3)
    figure.savefig(workdir / "loss.png", dpi=120)


def _replace(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
