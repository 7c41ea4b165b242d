"""Compares a Hugging Face folder with a checkpoint: every tensor, and the logits of a prompt."""

import argparse
import math
from collections.abc import Iterator

from convert import compare_logits, compare_tensors
from convert.compare_logits import Agreement
from convert.compare_tensors import Report
from convert.hf import peft_adapter
from convert.models import registry
from videonsa_jax.config.schema import ModelConfig
from videonsa_jax.errors import UserError
from videonsa_jax.training import checkpoint

SHOWN = 10  # lines of one kind; the rest is counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m convert verify`."""
    parser.add_argument("hf_dir", help="folder of a model or of a LoRA adapter")
    parser.add_argument("--base", metavar="HF_DIR", help="folder of the model that it adapts")
    parser.add_argument("checkpoint", help="folder of weights, or a run's --workdir")
    parser.add_argument(
        "--allow-unexpected",
        metavar="REGEX",
        help="ignore tensors of such names that the checkpoint does not have",
    )
    parser.add_argument(
        "--no-logits",
        action="store_true",
        help="compare tensors only; logits need PyTorch, transformers, and memory for all "
        "parameters in float32",
    )


def run(args: argparse.Namespace) -> int:
    """Prints what it finds; returns 0 if everything agrees, else 1.

    Raises:
      UserError: a side cannot be read.
    """
    family = registry.of_checkpoint(args.checkpoint)
    cfg = checkpoint.load_model_config(args.checkpoint, family.config_class)
    hf = peft_adapter.open_hf(args.hf_dir, args.base, report=print)
    if hf.family.whole is not family.whole:
        raise UserError(
            f"{args.hf_dir} is of the family {hf.family.name}, {args.checkpoint} of {family.name}; "
            "compare folders of one"
        )
    report = compare_tensors.compare(
        hf,
        args.checkpoint,
        cfg,
        allow_unexpected=args.allow_unexpected,
    )
    print("\n".join(_describe(report)))
    passed = report.is_equal
    missing, transformers_class = compare_logits.missing_packages(), hf.family.transformers_class
    if args.no_logits:
        print("logits: not compared, because of --no-logits")
    elif not report.is_one_model:
        print("logits: not compared, because the sides are not one model")
    elif hf.base is not None:
        print("logits: not compared, because transformers does not merge an adapter by itself")
    elif transformers_class is None:
        print(f"logits: not compared, because transformers has no class for {hf.family.name}")
    elif missing:
        print(
            f"logits: not compared, because {' and '.join(missing)} cannot be imported; how "
            "transformers loads the folder is known from its config.json and headers only"
        )
    else:
        agreement = compare_logits.compare(hf, args.checkpoint, cfg, rounded=report.rounded)
        print(_describe_logits(agreement, cfg))
        passed = passed and agreement.is_close
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


def _describe(report: Report) -> Iterator[str]:
    for kind, lines in report.problems.items():
        if lines:
            yield f"{kind}: {len(lines)}"
            yield from _first("  ", lines)
    yield from (f"note: {note}" for note in report.notes)
    if report.narrowed:
        yield (
            f"rounded: {len(report.narrowed)} tensors, when transformers loads all of them in "
            f"{report.load_dtype}; config.json should name float32"
        )
        yield from _first("  ", report.narrowed)
    worst = report.differences
    most = max((x.largest for x in worst), default=0.0)
    yield f"tensors: {report.compared} compared, {len(worst)} differ, largest difference {most:.3g}"
    if worst:
        yield f"  {'largest':>10} {'unequal':>14} {'of':>14}  tensor"
        sizes = [(x, math.prod(x.shape)) for x in worst]
        rows = [f"{x.largest:>10.3g} {x.unequal:>14,} {n:>14,}  {x.name}" for x, n in sizes]
        yield from _first("  ", rows)


def _first(indent: str, lines: list[str]) -> Iterator[str]:
    yield from (indent + line for line in lines[:SHOWN])
    if len(lines) > SHOWN:
        yield f"{indent}and {len(lines) - SHOWN} more"


def _describe_logits(agreement: Agreement, cfg: ModelConfig) -> str:
    advance = compare_logits.as_transformers(cfg).position_advance
    of_ours = "" if advance == cfg.position_advance else f", not {cfg.position_advance!r}"
    version = compare_logits.transformers_version()
    return (
        f"logits: {agreement.tokens} text tokens of a random prompt with a video, dense attention, "
        f"positions {advance!r} as transformers {version} counts{of_ours}\n"
        f"  largest difference {agreement.largest:.2e} of the largest logit (limit "
        f"{compare_logits.RELATIVE_LIMIT:.0e}), KL {agreement.divergence:.2e}, "
        f"top-1 agreement {agreement.top1:.1%}"
    )
