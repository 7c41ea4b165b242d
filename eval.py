"""Evaluates a checkpoint: asks a task's questions, scores the generated answers.

python eval.py --config=configs/X.py[:variant] --checkpoint=DIR --task=needle[,NAME...] --out=DIR
    [--limit=N] [--blind] [--config.section.field=VALUE]

Writes DIR/<task>.jsonl, one row per question as they come, and DIR/<task>_summary.json. The same
command again continues an interrupted evaluation.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags, logging

from videonsa_jax.config import parse
from videonsa_jax.config.run import RunConfig
from videonsa_jax.errors import UserError, file_errors
from videonsa_jax.evaluation import setup
from videonsa_jax.evaluation.runner import evaluate
from videonsa_jax.sharding import mesh as meshes
from videonsa_jax.training import checkpoint_steps


def main(argv: Sequence[str]) -> None:
    """Reads flags, evaluates, prints one line per task."""
    del argv
    logging.set_verbosity(logging.ERROR)  # Orbax warns that a checkpoint is opened to be read
    checkpoint_steps.quiet()
    args = flags.FLAGS
    try:
        cfg = parse.parse(parse.load_config(args.config), args.override)
        summaries = run(
            cfg, args.checkpoint, args.task, args.out, limit=args.limit, blind=args.blind
        )
    except UserError as error:
        sys.exit(f"eval.py: {error}")
    for summary in summaries:
        print(describe(summary))


def run(
    cfg: RunConfig,
    checkpoint: str,
    tasks: Sequence[str],
    out: str | pathlib.Path,
    *,
    limit: int | None = None,
    blind: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> list[dict[str, Any]]:
    """Evaluates the newest parameters of a folder.

    Args:
      cfg: the model, how it is computed and sampled, the files of questions.
      checkpoint: a run's working directory, or a folder of weights.
      tasks: names of `videonsa_jax.evaluation.tasks`.
      out: folder of the results.
      limit: ask only the first questions of each task.
      blind: blank all frames.
      devices: to use; None is all of them.

    Returns:
      The summary of each task, see `videonsa_jax.evaluation.runner.evaluate`.

    Raises:
      UserError: what the user can mend.
    """
    with file_errors(out, lambda: "once mended, the same command goes on"):
        questions = {task: setup.load_questions(cfg, task, limit) for task in tasks}
        mesh = meshes.make_mesh(cfg.mesh, devices)
        with jax.set_mesh(mesh):
            evaluator = setup.open_evaluator(cfg, checkpoint, mesh, blind=blind)
            return [evaluate(evaluator, questions[task], task=task, out=out) for task in tasks]


def describe(summary: dict[str, Any]) -> str:
    """A summary in one line."""
    chance = "" if summary["chance"] is None else f", chance {summary['chance']:.3f}"
    kinds = [f"{kind} {value['accuracy']:.3f}" for kind, value in summary["kinds"].items()]
    return (
        f"{summary['task']}: accuracy {summary['accuracy']:.3f} ({', '.join(kinds)}) of "
        f"{summary['n']} questions{chance}; {summary['n_failed']} failed, "
        f"{summary['n_unparsed']} unparsed; {summary['attention']} attention, "
        f"{'blind, ' if summary['blind'] else ''}{summary['wall_s']:.0f} s"
    )


def define_flags() -> None:
    """Not at import: one process may import several programs, whose flags share names."""
    parse.define_config_flags()
    flags.DEFINE_string(
        "checkpoint", None, "a run's --workdir, or a folder of weights", required=True
    )
    flags.DEFINE_list("task", None, "tasks, separated by commas: needle, mcq", required=True)
    flags.DEFINE_string("out", None, "folder of the results", required=True)
    flags.DEFINE_integer("limit", None, "ask only the first questions of each task", lower_bound=1)
    flags.DEFINE_bool("blind", False, "blank all frames: what do the questions alone give away?")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=lambda argv: flags.FLAGS(parse.override_flags(argv)))
