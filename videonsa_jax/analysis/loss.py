"""Loss curves of one or several runs, from their `metrics.jsonl`."""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from videonsa_jax.analysis import report
from videonsa_jax.errors import UserError
from videonsa_jax.training import metrics

PANELS = {"loss": "loss (nats per target token)", "accuracy": "accuracy of target tokens"}
SMOOTHING = 0.05  # share of a run's rows that the bold line averages


def curves(runs: Mapping[str, str | pathlib.Path], out: str | pathlib.Path) -> dict[str, Any]:
    """Writes loss.csv, loss.png and loss.json.

    Args:
      runs: label -> working directory of a run.
      out: folder.

    Returns:
      Per label: rows, last_step, loss_first and loss_last (of the first and the last row, each a
      mean over the steps between two rows).

    Raises:
      UserError: a run has no metrics yet.
    """
    tables = {label: _rows(pathlib.Path(folder)) for label, folder in runs.items()}
    summary = {
        label: {
            "rows": len(rows),
            "last_step": rows[-1]["step"],
            "loss_first": rows[0]["loss"],
            "loss_last": rows[-1]["loss"],
        }
        for label, rows in tables.items()
    }
    table = [
        {"run": label, "step": row["step"], **{name: row[name] for name in PANELS}}
        for label, rows in tables.items()
        for row in rows
    ]
    report.write(out, "loss", rows=table, summary=summary, figure=_figure(tables))
    return summary


def _rows(folder: pathlib.Path) -> list[dict[str, Any]]:
    rows = [row for row in metrics.read_rows(folder) if row["loss"] is not None]
    if not rows:
        raise UserError(f"{folder / metrics.FILE}: no rows; is {folder} a run's --workdir?")
    return rows


def _figure(tables: Mapping[str, Sequence[Mapping[str, Any]]]):
    figure = report.new_figure(10, 3.8)
    for axes, (name, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for number, (label, rows) in enumerate(tables.items()):
            colour = report.COLOURS[number % len(report.COLOURS)]
            steps = np.array([row["step"] for row in rows])
            values = np.array([row[name] for row in rows], float)
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
            width = max(1, round(SMOOTHING * len(rows)))
            axes.plot(steps, _running_mean(values, width), color=colour, label=label)
        axes.set(xlabel="step", ylabel=title)
        axes.set_ylim(bottom=0, top=1 if name == "accuracy" else None)
        axes.legend(frameon=False)
        report.tidy(axes)
    return figure


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of about `width` values around each, fewer at the ends."""
    sums = np.cumsum(np.insert(values, 0, 0))
    middle = np.arange(len(values))
    start = np.maximum(middle - width // 2, 0)
    stop = np.minimum(middle + width // 2 + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="working directory, or LABEL=DIR")


def main(args: argparse.Namespace) -> None:
    """Runs the verb."""
    pairs = [run.rpartition("=") for run in args.runs]
    curves({label or pathlib.Path(folder).name: folder for label, _, folder in pairs}, args.out)
