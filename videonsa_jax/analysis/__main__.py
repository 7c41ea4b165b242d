"""python -m videonsa_jax.analysis VERB --out=DIR ...; VERB --help lists the flags of a verb."""

import argparse
import sys
from collections.abc import Sequence

from absl import logging

from videonsa_jax.analysis import attended, gates, loss, selection
from videonsa_jax.config import parse
from videonsa_jax.errors import UserError, file_errors
from videonsa_jax.training import checkpoint_steps

VERBS = {"loss": loss, "gates": gates, "selection": selection, "attended": attended}


def main(argv: Sequence[str]) -> None:
    """Parses the command line and runs one verb."""
    parser = argparse.ArgumentParser(prog="python -m videonsa_jax.analysis")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, module in VERBS.items():
        summary = module.__doc__.split("\n", 1)[0]
        verb = verbs.add_parser(name, help=summary, description=summary)
        module.add_arguments(verb)
        verb.add_argument("--out", required=True, help="folder of the CSV, PNG and JSON files")
    logging.set_verbosity(logging.ERROR)  # Orbax warns that a checkpoint is opened to be read
    checkpoint_steps.quiet()
    args = parser.parse_args(parse.override_flags(argv))
    try:
        with file_errors(args.out, lambda: "once mended, the same command starts over"):
            VERBS[args.verb].main(args)
    except UserError as error:
        sys.exit(f"{parser.prog} {args.verb}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
