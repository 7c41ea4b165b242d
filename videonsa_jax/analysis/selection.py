"""Which blocks of one video its vision queries select, under a strip of its frames."""

import argparse
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from videonsa_jax.analysis import frames, inputs, report, trace
from videonsa_jax.analysis.attended import pair_counts, selected_pairs
from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.sample import Sample
from videonsa_jax.errors import UserError
from videonsa_jax.evaluation import scoring
from videonsa_jax.evaluation.question import Question
from videonsa_jax.evaluation.runner import Evaluator

MAX_PICTURES = 16
PANELS = {
    "by_last": "queries of the last frames that select a block",
    "by_later": "queries of later blocks that select a block (grey: there are none)",
}
WIDTH = 9.5  # inches, of the strip


def strip(evaluator: Evaluator, question: Question, out: str | pathlib.Path) -> dict[str, Any]:
    """Writes selection.csv, selection.png and selection.json.

    Two shares are drawn per layer and block, both over queries and KV heads: of the queries of the
    last temporal patch, how many select the block; of the queries in later blocks, how many do.

    Args:
      evaluator: the model.
      question: whose video to look at.
      out: folder.

    Returns:
      id, prompt, generated, answer; vision_tokens; attended_fraction in closed form, and
      selected_pairs per layer as counted beside the closed form's.

    Raises:
      UserError: the video cannot be used, or the model uses dense attention.
    """
    try:
        sample = evaluator.load(question)
    except BadSample as error:
        raise UserError(str(error)) from error
    nsa = evaluator.model.cfg.nsa
    steps = frames.steps(sample, evaluator.model.cfg.vision)
    members = _members(evaluator, sample)
    rows = [
        {"layer": layer, "block": block, "by_last": float(last), "by_later": float(later)}
        for layer, chosen in enumerate(members)
        for block, (last, later) in enumerate(_shares(chosen, steps[-1].tokens, nsa.block_size))
    ]
    counts = pair_counts(members.shape[1], nsa)
    summary = {
        "id": question.id,
        "prompt": question.prompt,
        "generated": evaluator.answer([sample])[0],
        "answer": question.answer,
        "vision_tokens": members.shape[1],
        "attended_fraction": counts.fraction,
        "selected_pairs": counts.selected,
        "selected_pairs_counted": [selected_pairs(m, nsa.block_size) for m in members],
    }
    figure = _figure(rows, steps, _title(question, summary["generated"]), nsa.block_size)
    report.write(out, "selection", rows=rows, summary=summary, figure=figure)
    return summary


def _members(evaluator: Evaluator, sample: Sample) -> np.ndarray:
    """bool[l r k c]: the blocks of each vision query, padding left out."""
    batch = evaluator.batch([sample])
    tokens = int((batch.vision_order[0] >= 0).sum())
    blocks = -(-tokens // evaluator.model.cfg.nsa.block_size)
    return np.stack(
        [
            np.asarray(decisions.blocks.members(blocks)[0, :tokens])
            for decisions in trace.layers(evaluator.model, batch)
        ]
    )


def _shares(members: np.ndarray, last_tokens: int, block_size: int) -> np.ndarray:
    """bool[r k c] -> f[c 2]: by the last queries; by those of later blocks, NaN without any."""
    own = np.arange(len(members)) // block_size
    later = own[:, None] > np.arange(members.shape[-1])  # [r c]
    chosen = (members.mean(axis=1) * later).sum(axis=0)
    with np.errstate(invalid="ignore"):
        by_later = chosen / later.sum(axis=0)
    return np.stack([members[-last_tokens:].mean(axis=(0, 1)), by_later], axis=-1)


def _title(question: Question, generated: str) -> str:
    """The question's first line, the model's answer and the right one."""
    text = re.sub(r"<(?:image|video)>\s*", "", question.prompt).strip().splitlines()[0]
    parsed, correct = scoring.score(generated, question)
    if parsed is None:
        return f"{text}\nno answer, right is {question.answer}"
    named = dict(zip(scoring.LETTERS, question.options, strict=False))

    def show(answer):
        return f"{answer} ({named[answer]})" if answer in named else str(answer)

    verdict = "right" if correct else f"wrong, right is {show(question.answer)}"
    return f"{text}\nanswer {show(parsed)}: {verdict}"


def _figure(rows: Sequence[dict], steps: Sequence[frames.Step], title: str, block_size: int):
    layers = rows[-1]["layer"] + 1
    height, width = steps[0].image.shape[:2]
    strip_height = WIDTH / min(len(steps), MAX_PICTURES) * height / width
    heat_height = 0.14 * max(layers, 5)
    figure = report.new_figure(WIDTH + 1.5, strip_height + 2 * heat_height + 1.8)
    ratios = (strip_height, heat_height, heat_height)
    pictures, *heats = figure.subplots(3, 1, sharex=True, height_ratios=ratios)
    figure.suptitle(title, fontsize=11)
    _draw_pictures(pictures, steps, block_size)
    stop = sum(step.tokens for step in steps) / block_size
    for axes, (name, label) in zip(heats, PANELS.items(), strict=True):
        values = np.array([row[name] for row in rows]).reshape(layers, -1)
        edges = np.minimum(np.arange(values.shape[1] + 1), stop) - 0.5
        lines = np.arange(layers + 1) - 0.5
        mesh = axes.pcolormesh(edges, lines, values, vmin=0, vmax=1, cmap="viridis")
        axes.set_title(label, fontsize=10)
        axes.set(ylabel="layer", facecolor="0.92")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.spines[:].set_visible(False)
    heats[-1].set_xlabel(f"block of {block_size} vision tokens")
    heats[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(mesh, ax=heats, label="share", pad=0.01, aspect=20)
    return figure


def _draw_pictures(axes: Axes, steps: Sequence[frames.Step], block_size: int) -> None:
    """One picture per stretch of equal length, from the stretch's middle, above its blocks."""
    edges = np.cumsum([0, *(step.tokens for step in steps)]) / block_size - 0.5
    for stretch in np.array_split(np.arange(len(steps)), min(len(steps), MAX_PICTURES)):
        step = steps[stretch[len(stretch) // 2]]
        left, right = edges[stretch[0]], edges[stretch[-1] + 1]
        gap = 0.02 * (right - left)
        axes.imshow(step.image, extent=(left + gap, right - gap, 0, 1), aspect="auto")
        if step.seconds is not None:
            axes.text((left + right) / 2, 1.03, f"{step.seconds:.3g} s", ha="center", fontsize=8)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1))
    axes.set_axis_off()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    inputs.add_arguments(parser)
    parser.add_argument("--question", help="id of the question; the task's first one if not given")


def main(args: argparse.Namespace) -> None:
    """Runs the verb."""
    with inputs.opened(args) as (evaluator, questions):
        chosen = [q for q in questions if args.question in (None, q.id)]
        if not chosen:
            raise UserError(f"--question={args.question}: no such id in the task's file")
        strip(evaluator, chosen[0], args.out)
