"""Compiles every kernel for a device that is not there, and checks what it uses.

    make compile-check TARGET=h100 OUT=FILE.json

runs this file in `.venv-aot`, whose JAX can compile for the target. Every operation, and its
gradients, are compiled at the geometry of Qwen2.5-VL-7B, in bfloat16, for 32K and 128K tokens, then
the whole prefill of the 7B model over 128K video tokens. Prints a table and writes

    {"target", "geometry", "versions", "ok", "broken",
     "kernels": [{"name", "phase", "tokens", "registers", "spill_bytes", "shared_bytes",
                  "vmem_bytes", "wgmma", "mma", "compile_s"}],
     "programs": [{"name", "tokens", "argument_bytes", "output_bytes", "temporary_bytes",
                   "total_bytes", "device_bytes", "kernels", "compile_s"}]}

where a number that a target does not have is null and "broken" has a sentence per broken limit.

Exit codes. 0: every limit is kept. 1: an operation does not compile, spills registers, takes too
much shared memory, multiplies without the matrix units (or with them in float32, which they round),
or the model does not fit the device. 3: this machine lacks the packages that compile for the
target; `make` prints that code and itself exits with 2, as it always does.
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import sys

from benchmarks.aot import hopper
from benchmarks.aot.cases import backward_cases, forward_cases
from benchmarks.aot.prefill import prefill_case
from benchmarks.aot.report import NotHere, Rejected
from benchmarks.inputs import BLOCK_COUNT, BLOCK_SIZE, HEADS, KV_HEADS, WIDTH, WINDOW_SIZE
from pallas_kernels.tiles import DTYPES, HEAD_WIDTHS

TARGETS = {"h100": hopper}
BROKEN, MISSING = 1, 3  # exit codes
TEXT_TOKENS, COMPUTED_IN = 2048, "bfloat16"  # of the prefill
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


def check(target, args):
    """The report as a dictionary; `target` is a module of `benchmarks.aot`."""
    kernels, programs, broken = [], [], []
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("jax", *target.PACKAGES)}

    def compiled(name, dtype, run, arguments):
        """The program, None if there is none; notes what is wrong with it."""
        try:
            program = target.compile_program(run, arguments)
        except Rejected as error:
            broken.append(f"{name} does not compile: {error}")
            return None
        versions.update(program.versions)
        for use in program.kernels:
            broken.extend(f"{name}: {use.name} {x}" for x in target.problems(use, dtype))
        return program

    for tokens in (int(tokens) for tokens in args.tokens.split(",")):
        shape = {"dtype": args.dtype, "width": args.head_width}
        shape["implementation"] = target.IMPLEMENTATION
        for case in (*forward_cases(tokens, **shape), *backward_cases(tokens, **shape)):
            name = f"{case.name}, {case.phase}, at {tokens} tokens"
            if program := compiled(name, args.dtype, case.run, case.arguments):
                rows = [_kernel_row(case, tokens, program, use) for use in program.kernels]
                known = {(row["name"], row["tokens"]) for row in kernels}
                kernels += [row for row in rows if (row["name"], tokens) not in known]
    if args.prefill:
        case = prefill_case(args.prefill, TEXT_TOKENS)
        if program := compiled("7B prefill", COMPUTED_IN, *case):
            programs.append(_program_row("7B prefill", args.prefill, program, target.DEVICE_BYTES))
            if program.memory.total > target.DEVICE_BYTES:
                broken.append(f"7B prefill takes {program.memory.total} of {target.DEVICE_BYTES}")
    return {
        "target": args.target,
        "geometry": {
            "dtype": args.dtype,
            "heads": HEADS,
            "kv_heads": KV_HEADS,
            "head_width": args.head_width,
            "block_size": BLOCK_SIZE,
            "block_count": BLOCK_COUNT,
            "window_size": WINDOW_SIZE,
        },
        "versions": versions,
        "ok": not broken,
        "broken": broken,
        "kernels": kernels,
        "programs": programs,
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


def _program_row(name, tokens, program, device_bytes):
    return {
        "name": name,
        "tokens": tokens,
        "argument_bytes": program.memory.arguments,
        "output_bytes": program.memory.outputs,
        "temporary_bytes": program.memory.temporaries,
        "total_bytes": program.memory.total,
        "device_bytes": device_bytes,
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
        print(f"{row['name']}, {row['tokens']} tokens, GiB: {sizes}; {row['compile_s']} s")
    for problem in report["broken"]:
        print(f"BROKEN: {problem}")
    if report["ok"]:
        print("every limit is kept")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--tokens", default="32768,131072", help="lengths, by comma")
    parser.add_argument("--prefill", type=int, default=131_072, help="vision tokens; 0: leave out")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--head_width", type=int, default=WIDTH, choices=HEAD_WIDTHS)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="FILE.json")
    args = parser.parse_args()

    target = TARGETS[args.target]
    try:
        target.require()
        report = check(target, args)
    except NotHere as error:
        print(f"compile_check: cannot compile for {args.target} here: {error}", file=sys.stderr)
        return MISSING
    print_report(report)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if report["ok"] else BROKEN


if __name__ == "__main__":
    sys.exit(main())
