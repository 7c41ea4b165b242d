"""Samples and stores a config's videos once, so that training does not decode them again.

python -m videonsa_jax.data.prepare --config=configs/X.py[:variant] --out=DIR [--format=png]
    [--config.section.field=VALUE]

Then train with --config.data.source='("tfds:DIR",)'.
"""

import sys
from collections.abc import Sequence

from absl import app, flags, logging

from videonsa_jax.config import parse
from videonsa_jax.data import pipeline, tfds_builder
from videonsa_jax.errors import UserError, file_errors

flags.DEFINE_string("config", None, "config file, path.py or path.py:variant", required=True)
flags.DEFINE_multi_string("override", [], "section.field=value; written --config.section.field=")
flags.DEFINE_string("out", None, "a new folder", required=True)
flags.DEFINE_enum("format", "jpeg", ["jpeg", "png"], "of the stored frames; png loses nothing")


def main(argv: Sequence[str]) -> None:
    """Reads flags, prepares, logs one line."""
    del argv
    args = flags.FLAGS
    try:
        cfg = parse.parse(parse.load_config(args.config), args.override)
        with file_errors(args.out, lambda: "once mended, the same command starts over"):
            counts = tfds_builder.prepare(
                pipeline.open_source(cfg.data),
                cfg.data,
                cfg.model.vision,
                args.out,
                image_format=args.format,
            )
    except UserError as error:
        sys.exit(f"prepare: {error}")
    logging.info("%s: %s", args.out, ", ".join(f"{n} {name}" for name, n in counts.items()))


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: flags.FLAGS(parse.override_flags(argv)))
