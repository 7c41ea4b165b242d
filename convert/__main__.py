"""python -m convert VERB ...; VERB --help lists the flags of a verb."""

import argparse
import os
import sys
from collections.abc import Sequence

import jax
from absl import logging

from convert import from_hf, inspect, logits, to_hf, verify
from videonsa_jax.errors import UserError
from videonsa_jax.training import checkpoint_steps

VERBS = {
    "from-hf": from_hf,
    "to-hf": to_hf,
    "verify": verify,
    "inspect": inspect,
    "logits": logits,
}
COMPUTING = ("verify", "logits")


def main(argv: Sequence[str]) -> int:
    """Parses the command line and runs one verb; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m convert")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in VERBS.items():
        summary = module.__doc__.split("\n", 1)[0]
        verb = verbs.add_parser(name, help=summary, description=summary)
        module.add_arguments(verb)
    args = parser.parse_args(argv)
    if args.verb not in COMPUTING:
        jax.config.update("jax_platforms", "cpu")  # no accelerator is taken to move bytes
    logging.set_verbosity(logging.ERROR)  # Orbax tells much about each step
    checkpoint_steps.quiet()
    try:
        return VERBS[args.verb].run(args)
    except UserError as error:
        return _stop(f"{parser.prog} {args.verb}: {error}", 1)
    except KeyboardInterrupt:
        return _stop(f"{parser.prog} {args.verb}: interrupted", 130)
    except BrokenPipeError:  # the reader of a table, for example `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _stop(f"{parser.prog} {args.verb}: {error.filename}: {error.strerror}", 1)


def _stop(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
