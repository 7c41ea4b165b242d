"""From nothing to a table: generated videos, a tiny VideoNSA, the same model with dense attention.

python -m examples.demo --workdir=runs/demo [--kind=first] [--config.section.field=VALUE]

Writes real mp4 files with questions, trains a tokenizer and both models, lets both answer the
questions about videos they have not seen, and one of them again with blanked frames. Results:
report.json and PNG files in the working directory. The same command again goes on where an
interrupted one stopped.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

import jax
from absl import logging

import train
from videonsa_jax.analysis import attended, gates, inputs, loss, selection
from videonsa_jax.config import parse
from videonsa_jax.config.run import RunConfig
from videonsa_jax.data import chat, needle, sources
from videonsa_jax.data.tokenizer import Tokenizer, train_bpe
from videonsa_jax.errors import UserError
from videonsa_jax.evaluation import setup
from videonsa_jax.evaluation.runner import Evaluator, evaluate
from videonsa_jax.progress import Progress
from videonsa_jax.sharding import mesh as meshes

CONFIG = pathlib.Path(__file__).parents[1] / "configs/demo.py"
ATTENTION = {"nsa": "paper", "dense": "dense"}  # name of the run -> model.attention
DRAWN = 16  # held-out videos whose gates are averaged


@dataclasses.dataclass(frozen=True)
class Demo:
    """What to do and where."""

    workdir: pathlib.Path
    clips: needle.NeedleConfig
    counts: dict[str, int]  # clips per split
    overrides: Sequence[str]

    def config(self, name: str) -> RunConfig:
        """Of the run `name`, one of ATTENTION: they differ in nothing else."""
        splits = {split: self.workdir / "clips" / f"{split}.json" for split in needle.SPLITS}
        return parse.parse(
            parse.load_config(f"{CONFIG}:{self.clips.kind}"),
            [
                f"data.source=({str(splits['train'])!r},)",
                f"eval.tasks.needle={splits['heldout']}",
                f"data.tokenizer={self.workdir / 'tokenizer'}",
                f"model.attention={ATTENTION[name]}",
                *self.overrides,
            ],
        )


def run(demo: Demo) -> dict:
    """All of it; returns the report."""
    started = time.monotonic()
    _say("1 of 5: writing clips and questions")
    write_clips(demo)
    train_tokenizer(demo)
    for number, name in enumerate(ATTENTION, start=2):
        _say(f"{number} of 5: training with {ATTENTION[name]} attention")
        train.run(demo.config(name), demo.workdir / name)
    _say("4 of 5: answering questions about videos not seen in training")
    summaries = {
        name: answer(demo, "nsa" if name == "blind" else name, blind=name == "blind")
        for name in (*ATTENTION, "blind")
    }
    _say("5 of 5: drawing")
    curves = loss.curves({name: demo.workdir / name for name in ATTENTION}, demo.workdir)
    report = {
        name: {key: summaries[name][key] for key in ("accuracy", "n")}
        | {key: curves[name][key] for key in ("loss_first", "loss_last")}
        for name in ATTENTION
    }
    report["blind"] = summaries["blind"]["accuracy"]
    report["chance"] = summaries["nsa"]["chance"]
    report["attended_fraction"] = draw(demo)
    report["wall_s"] = round(time.monotonic() - started, 1)
    (demo.workdir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def write_clips(demo: Demo) -> None:
    """The videos, and one JSON file of questions per split."""
    with Progress("clips", sum(demo.counts.values())) as progress:
        needle.write_dataset(
            demo.workdir / "clips", demo.clips, demo.counts, lambda *_: progress.advance(1)
        )


def train_tokenizer(demo: Demo) -> Tokenizer:
    """A tokenizer for the questions of every kind, so that the kinds share their token ids."""
    texts = []
    for kind in needle.QUESTIONS:
        cfg = dataclasses.replace(demo.clips, kind=kind)
        for clip in needle.plan(cfg, "train", len(needle.LETTERS)):
            record = needle.record(cfg, clip, "clip.mp4")
            texts.append(
                chat.render(sources.parse_record(record, clip.name, demo.workdir).messages)
            )
    size = demo.config("nsa").model.text.vocab_size
    return train_bpe(texts, size, demo.workdir / "tokenizer")


def answer(demo: Demo, name: str, *, blind: bool) -> dict:
    """Generates the answers of one model; returns the evaluation's summary."""
    with evaluator(demo, name, blind=blind) as (model, questions):
        out = demo.workdir / "eval" / ("blind" if blind else name)
        return evaluate(model, questions, task="needle", out=out)


def draw(demo: Demo) -> float:
    """Gates and selected blocks of the sparse model; returns the share of pairs it attends to."""
    with evaluator(demo, "nsa") as (model, questions):
        gates.profile(model, inputs.load_samples(model, questions[:DRAWN]), demo.workdir)
        strip = selection.strip(model, questions[0], demo.workdir)
    return attended.attended_fraction(strip["vision_tokens"], model.model.cfg.nsa)


@contextlib.contextmanager
def evaluator(demo: Demo, name: str, *, blind: bool = False) -> Iterator[tuple[Evaluator, list]]:
    """A trained model under its mesh, and the held-out questions."""
    cfg = demo.config(name)
    mesh = meshes.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        folder = str(demo.workdir / name)
        yield (
            setup.open_evaluator(cfg, folder, mesh, blind=blind),
            setup.load_questions(cfg, "needle"),
        )


def table(report: dict) -> str:
    """The report for people."""
    lines = [f"{'attention':<24}{'accuracy':>9}{'questions':>11}{'loss: first':>13}{'last':>8}"]
    for name, title in (("nsa", "sparse (VideoNSA)"), ("dense", "dense")):
        row = report[name]
        lines.append(
            f"{title:<24}{row['accuracy']:>9.3f}{row['n']:>11}"
            f"{row['loss_first']:>13.3f}{row['loss_last']:>8.4f}"
        )
    lines += [
        f"{'sparse, frames blanked':<24}{report['blind']:>9.3f}",
        f"{'guessing':<24}{report['chance']:>9.3f}",
        f"sparse attention uses {report['attended_fraction']:.0%} of the causal pairs of vision "
        f"tokens; {report['wall_s']:.0f} s in all",
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def main(argv: Sequence[str]) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/demo"))
    parser.add_argument("--kind", choices=needle.QUESTIONS, default="what", help="of the questions")
    parser.add_argument("--train", type=int, default=1000, help="clips to train on")
    parser.add_argument("--heldout", type=int, default=200, help="clips to be asked about")
    parser.add_argument("--override", action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(parse.override_flags(argv))
    logging.set_verbosity(logging.ERROR)  # Orbax warns of every folder it only reads
    counts = {"train": args.train, "heldout": args.heldout}
    demo = Demo(args.workdir, needle.NeedleConfig(kind=args.kind), counts, args.override)
    try:
        report = run(demo)
    except UserError as error:
        sys.exit(f"{parser.prog}: {error}")
    print(f"\n{table(report)}\n\n{args.workdir}/report.json and *.png")


if __name__ == "__main__":
    main(sys.argv[1:])
