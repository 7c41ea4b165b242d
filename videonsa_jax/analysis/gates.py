"""Mean gate per layer and branch over the vision tokens of some videos."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from videonsa_jax.analysis import inputs, report, trace
from videonsa_jax.data.sample import Sample
from videonsa_jax.evaluation.runner import Evaluator
from videonsa_jax.model.gates import BRANCHES
from videonsa_jax.progress import Progress

LABELS = {"cmp": "compressed", "slc": "selected", "swa": "window"}
BINS = 1000  # quartiles are exact to one bin of [0, 1]


def profile(
    evaluator: Evaluator, samples: Sequence[Sample], out: str | pathlib.Path
) -> dict[str, Any]:
    """Writes gates.csv, gates.png and gates.json.

    Args:
      evaluator: the model.
      samples: from `evaluator.load`, at least one.
      out: folder.

    Returns:
      samples, vision_tokens (of all samples), mean: branch -> value per layer. Every vision token
      and head counts alike.

    Raises:
      UserError: the model uses dense attention.
    """
    model = evaluator.model.cfg.text
    counts = np.zeros((model.num_layers, len(BRANCHES), BINS), np.int64)
    sums = np.zeros((model.num_layers, len(BRANCHES)))
    tokens = 0
    with Progress("gates", len(samples)) as progress:
        for sample in samples:
            batch = evaluator.batch([sample])
            seen = batch.vision_order[0] >= 0
            tokens += int(seen.sum())
            for layer, decisions in enumerate(trace.layers(evaluator.model, batch)):
                gates = np.asarray(decisions.gates[0])[seen]  # [tokens n 3]
                sums[layer] += gates.sum(axis=(0, 1), dtype=np.float64)
                for branch in range(len(BRANCHES)):
                    counts[layer, branch] += np.histogram(gates[..., branch], BINS, (0, 1))[0]
            progress.advance(1)
    rows = _rows(sums / counts.sum(axis=-1), counts)
    summary = {
        "samples": len(samples),
        "vision_tokens": tokens,
        "mean": {b: [row["mean"] for row in rows if row["branch"] == b] for b in BRANCHES},
    }
    report.write(out, "gates", rows=rows, summary=summary, figure=_figure(rows, tokens))
    return summary


def _rows(means: np.ndarray, counts: np.ndarray) -> list[dict[str, Any]]:
    """f[l 3] and i[l 3 bins] -> one row per layer and branch."""
    shares = np.cumsum(counts, axis=-1) / counts.sum(axis=-1, keepdims=True)
    low, high = (((shares < q).sum(axis=-1) + 0.5) / BINS for q in (0.25, 0.75))
    return [
        {
            "layer": layer,
            "branch": branch,
            "mean": float(means[layer, i]),
            "quartile_1": float(low[layer, i]),
            "quartile_3": float(high[layer, i]),
        }
        for layer in range(len(means))
        for i, branch in enumerate(BRANCHES)
    ]


def _figure(rows: Sequence[dict[str, Any]], tokens: int):
    figure = report.new_figure(7, 4)
    axes = figure.subplots()
    for branch, colour in zip(BRANCHES, report.COLOURS, strict=False):
        own = [row for row in rows if row["branch"] == branch]
        layers = [row["layer"] for row in own]
        low, mean, high = ([r[k] for r in own] for k in ("quartile_1", "mean", "quartile_3"))
        axes.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(layers, mean, color=colour, marker="o", markersize=4, label=LABELS[branch])
    axes.set(
        xlabel="layer",
        ylabel="gate",
        ylim=(0, 1),
        title=f"Mean gate and interquartile range of {tokens:,} vision tokens",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(frameon=False, ncols=len(BRANCHES), loc="outside lower center")
    report.tidy(axes)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    inputs.add_arguments(parser)
    parser.add_argument("--limit", type=int, default=16, help="use the first videos of the task")


def main(args: argparse.Namespace) -> None:
    """Runs the verb."""
    with inputs.opened(args) as (evaluator, questions):
        profile(evaluator, inputs.load_samples(evaluator, questions[: args.limit]), args.out)
