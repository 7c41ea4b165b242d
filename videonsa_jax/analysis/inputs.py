"""The model and the questions that a verb looks at, from the command line."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence

import jax

from videonsa_jax.config import parse
from videonsa_jax.config.run import RunConfig
from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.sample import Sample
from videonsa_jax.errors import UserError
from videonsa_jax.evaluation import setup
from videonsa_jax.evaluation.question import Question
from videonsa_jax.evaluation.runner import Evaluator
from videonsa_jax.sharding import mesh as meshes


def add_config(parser: argparse.ArgumentParser) -> None:
    """--config and its overrides."""
    parser.add_argument("--config", required=True, help="config file, path.py or path.py:variant")
    parser.add_argument("--override", action="append", default=[], help=argparse.SUPPRESS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --checkpoint and --task."""
    add_config(parser)
    parser.add_argument("--checkpoint", required=True, help="a run's workdir, or weights")
    parser.add_argument("--task", default="needle", help="whose videos to look at")


def config_of(args: argparse.Namespace) -> RunConfig:
    """Raises UserError: the config file or an override is wrong."""
    return parse.parse(parse.load_config(args.config), args.override)


@contextlib.contextmanager
def opened(args: argparse.Namespace) -> Iterator[tuple[Evaluator, list[Question]]]:
    """The checkpoint's model under its mesh, and all questions of the task."""
    cfg = config_of(args)
    questions = setup.load_questions(cfg, args.task)
    mesh = meshes.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        yield setup.open_evaluator(cfg, args.checkpoint, mesh), questions


def load_samples(evaluator: Evaluator, questions: Sequence[Question]) -> list[Sample]:
    """The questions that can be used; the others are named on stderr.

    Raises:
      UserError: none can.
    """
    samples = []
    for question in questions:
        try:
            samples.append(evaluator.load(question))
        except BadSample as error:
            sys.stderr.write(f"left out {error}\n")
    if not samples:
        raise UserError(f"none of {len(questions)} questions can be used; see the lines above")
    return samples
