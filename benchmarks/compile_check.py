"""Compiles every kernel for a device that is not there, and checks what it uses.

    make compile-check TARGET=h100 OUT=FILE.json

runs this file in `.venv-aot`, whose JAX can compile for the target. Every operation, and its
gradients, are compiled at the geometry of Qwen2.5-VL-7B, in bfloat16, for several lengths of video;
then the 7B model's whole prefill and its whole training step, as configs/videonsa_7b_sft.py splits
them over devices. Prints a table and writes

    {"target", "geometry", "versions", "ok", "broken",
     "kernels": [{"name", "phase", "tokens", "registers", "spill_bytes", "shared_bytes",
                  "vmem_bytes", "wgmma", "mma", "compile_s"}],
     "programs": [{"name", "topology", "mesh", "rows", "tokens", "text_tokens", "argument_bytes",
                   "output_bytes", "temporary_bytes", "total_bytes", "device_bytes", "score_arrays",
                   "kernels", "compile_s"}]}

where bytes are those of one device, a number that a target does not have is null, and "broken" has
a sentence per broken limit.

Exit codes. 0: every limit is kept. 1: an operation does not compile, spills registers, takes too
much shared or vector memory, multiplies without a GPU's matrix units (or with them in float32,
which they round), the model leaves less than a tenth of a device's memory free, or holds a score
for every vision token and every block of keys at once. 3: this machine lacks the packages that
compile for the target; `make` prints that code and itself exits with 2, as it always does.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import sys

from benchmarks.aot import models
from benchmarks.aot.cases import backward_cases, forward_cases
from benchmarks.aot.shapes import scores
from benchmarks.aot.target import TARGETS
from benchmarks.inputs import BLOCK_COUNT, BLOCK_SIZE, HEADS, KV_HEADS, WIDTH, WINDOW_SIZE
from pallas_kernels import block_sizes
from videonsa_jax.aot.compile import HEADROOM, CompilationError
from videonsa_jax.aot.topology import ToolchainMissing

BROKEN, MISSING = 1, 3  # exit codes
COLUMNS = {  # of a kernel's row -> heading of the printed table
    "tokens": "tokens",
    "registers": "registers",
    "spill_bytes": "spilled",
    "shared_bytes": "shared",
    "vmem_bytes": "vmem",
    "wgmma": "wgmma",
    "mma": "mma",
    "compile_s": "compile s",
}
PARTS = ("argument", "output", "temporary", "total", "device")


class Check:
    """What is found out about one target."""

    def __init__(self, args):
        self.args = args
        self.target = TARGETS[args.target]
        self.kernels, self.programs, self.broken = [], [], []
        self.versions = {"python": platform.python_version()}
        for name in ("jax", *self.target.topology.chip.packages):
            self.versions[name] = importlib.metadata.version(name)

    def operations(self, tokens):
        """Compiles every operation for a video of `tokens`."""
        shape = {"dtype": self.args.dtype, "width": self.args.head_width}
        shape["implementation"] = self.target.implementation
        for case in (*forward_cases(tokens, **shape), *backward_cases(tokens, **shape)):
            name = f"{case.name}, {case.phase}, at {tokens} tokens"
            program = self._compiled(
                name,
                self.args.dtype,
                lambda case=case: self.target.compile_operation(case.run, case.arguments),
            )
            if program:
                rows = [_kernel_row(case, tokens, program, use) for use in program.kernels]
                known = {(row["name"], row["tokens"]) for row in self.kernels}
                self.kernels += [row for row in rows if (row["name"], tokens) not in known]

    def whole_model(self, phase, tokens):
        """Compiles the 7B model's prefill or training step over rows of `tokens` vision tokens."""
        model = models.shipped(self.args.target, self.target.implementation, phase, tokens)
        name = f"{model.name} on {model.topology.name}"
        dtype = model.cfg.compute.dtype
        if program := self._compiled(name, dtype, lambda: model.compile(self.target)):
            row = _program_row(model, program)
            self.programs.append(row)
            if row["total_bytes"] > (1 - HEADROOM) * row["device_bytes"]:
                sizes = f"{row['total_bytes']} of {row['device_bytes']} bytes"
                self.broken.append(f"{name} takes {sizes}, and should leave a tenth free")
            if row["score_arrays"]:
                self.broken.append(f"{name} holds all scores: {', '.join(row['score_arrays'])}")

    def _compiled(self, name, dtype, compile_program):
        """The program, None if there is none; notes what is wrong with it."""
        try:
            program = compile_program()
        except (CompilationError, NotImplementedError) as error:
            self.broken.append(f"{name} does not compile: {error}")
            return None
        self.versions.update(program.versions)
        for use in program.kernels:
            problems = self.target.problems(use, dtype)
            self.broken.extend(f"{name}: {use.name} {problem}" for problem in problems)
        return program

    def report(self):
        """The report as a dictionary."""
        return {
            "target": self.args.target,
            "geometry": {
                "dtype": self.args.dtype,
                "heads": HEADS,
                "kv_heads": KV_HEADS,
                "head_width": self.args.head_width,
                "block_size": BLOCK_SIZE,
                "block_count": BLOCK_COUNT,
                "window_size": WINDOW_SIZE,
            },
            "versions": self.versions,
            "ok": not self.broken,
            "broken": self.broken,
            "kernels": self.kernels,
            "programs": self.programs,
        }


def _kernel_row(case, tokens, program, use):
    return {
        "name": f"{case.name}/{use.name}",
        "phase": case.phase,
        "tokens": tokens,
        "registers": use.registers,
        "spill_bytes": use.spill_bytes,
        "shared_bytes": use.shared_bytes,
        "vmem_bytes": use.vmem_bytes,
        "wgmma": use.wgmma,
        "mma": use.mma,
        "compile_s": round(program.seconds, 1),  # of the whole operation
    }


def _program_row(model, program):
    text, shape = model.cfg.model.text, model.shape
    found = scores(
        program.hlo, shape.vision_tokens, BLOCK_SIZE, (text.num_heads, text.num_kv_heads)
    )
    return {
        "name": model.name,
        "topology": model.topology.name,
        "mesh": dataclasses.asdict(model.cfg.mesh),
        "rows": shape.rows,
        "tokens": shape.vision_tokens,
        "text_tokens": shape.text_tokens,
        "argument_bytes": program.memory.arguments,
        "output_bytes": program.memory.outputs,
        "temporary_bytes": program.memory.temporaries,
        "total_bytes": program.memory.total,
        "device_bytes": model.topology.chip.memory_bytes,
        "score_arrays": sorted(found),
        "kernels": sorted({use.name for use in program.kernels}),
        "compile_s": round(program.seconds, 1),
    }


def print_report(report):
    """A table of kernels, a line per program, a line per broken limit."""
    wide = max([len(row["name"]) for row in report["kernels"]], default=0)
    print(f"{'kernel':{wide}}", *(f"{heading:>9}" for heading in COLUMNS.values()))
    for row in report["kernels"]:
        values = ("-" if row[column] is None else row[column] for column in COLUMNS)
        print(f"{row['name']:{wide}}", *(f"{value:>9}" for value in values))
    for row in report["programs"]:
        sizes = ", ".join(f"{part} {row[f'{part}_bytes'] / 2**30:.2f}" for part in PARTS)
        where = f"{row['topology']}, {row['tokens']} tokens a row"
        print(f"{row['name']}, {where}, GiB a device: {sizes}; {row['compile_s']} s")
    for problem in report["broken"]:
        print(f"BROKEN: {problem}")
    if report["ok"]:
        print("every limit is kept")


def _lengths(text, default):
    return default if text is None else [int(tokens) for tokens in text.split(",") if tokens]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--tokens", help="lengths, by comma; '': no operation")
    parser.add_argument("--prefill", type=int, help="vision tokens of a row; 0: leave out")
    parser.add_argument("--train", type=int, help="likewise, of the training step")
    parser.add_argument("--dtype", default="bfloat16", choices=block_sizes.triton.DTYPES)
    parser.add_argument(
        "--head_width", type=int, default=WIDTH, choices=block_sizes.triton.HEAD_WIDTHS
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="FILE.json")
    args = parser.parse_args()

    target = TARGETS[args.target]
    try:
        target.topology.require()
        check = Check(args)
        for tokens in _lengths(args.tokens, target.tokens):
            check.operations(tokens)
        for phase, tokens in (("prefill", args.prefill), ("train", args.train)):
            tokens = models.VISION_TOKENS[phase][args.target] if tokens is None else tokens
            if tokens:
                check.whole_model(phase, tokens)
    except ToolchainMissing as error:
        print(f"compile_check: cannot compile for {args.target} here: {error}", file=sys.stderr)
        return MISSING
    report = check.report()
    print_report(report)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if report["ok"] else BROKEN


if __name__ == "__main__":
    sys.exit(main())
