"""What devices that share a video receive from each other, found by compiling alone.

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=64 python -m benchmarks.context_scaling --out=FILE.json

Compiles the sparse attention of vision tokens for 1 to 32 simulated devices that each hold a part
of the tokens: as many tokens per device as before (weak scaling), and as many in all (strong
scaling). Reads from the compiled programs, of the forward pass and of the backward pass, what a
device receives, and compares it with what `expected` counts. Nothing runs. Prints a table; writes
FILE.json and, beside it, FILE.png. Exit code 1: a program exchanges anything else.

XLA's CPU backend exchanges bfloat16 as float32, so float32 is what is compiled. In bfloat16 all of
it is half, but for the gradients of a ring, which stay float32.

With --memory=h100 (in `.venv-aot`, see `make aot`) it also compiles for 1 to 8 of these and shows
the temporaries of one. Those of simulated devices would say nothing: XLA's CPU backend starts the
rounds of a ring together.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import device
from benchmarks.context import plot as scaling_plot
from benchmarks.context.programs import Case, Geometry, compile_apart, temporary_bytes
from benchmarks.inputs import BLOCK_SIZE
from videonsa_jax.aot.hlo import Program
from videonsa_jax.aot.topology import GPUS_PER_NODE, parse_topology

MODES = ("gather", "ring")
PHASES = ("forward", "backward")
GRADIENT_BYTES = 4  # of a number that a ring adds up


def expected(case: Case, phase: str) -> dict[str, dict[str, int]]:
    """Bytes that a device receives, by collective and by what for.

    With c devices of n tokens, blocks of w tokens, and r bytes of a token's key and value (2 x KV
    heads / tensor x width x bytes of a number), a device receives in the forward pass

      (c - 1) n r / w                 "means", of the keys and values of all other devices' blocks,
      min(window - 1, (c - 1) n) r    "halo", the keys and values just before its own,
      (c - 1) n r                     "keys" and values of all others, the selected ones among them;

    and in the backward pass their gradients: "gather" sums what all devices have for a part and
    hands the sum to the owner of the part, which is as much again. A ring receives the keys once
    more and, with them and to get home, c n "gradients" in float32.
    """
    g = case.geometry
    number = jnp.dtype(case.dtype).itemsize
    row = 2 * g.kv_heads // case.tensor * g.width * number
    away = (case.context - 1) * case.tokens
    means = {"means": away // g.spec.block_size * row}
    halo = {"halo": min(g.spec.window_size - 1, away) * row}
    keys = {"keys": away * row}
    spread = "all-gather" if phase == "forward" else "reduce-scatter"
    if case.mode == "gather":
        return {spread: means | keys, "collective-permute": halo}
    if phase == "backward" and case.context > 1:
        keys["gradients"] = case.context * case.tokens * row // number * GRADIENT_BYTES
    return {spread: means, "collective-permute": halo | keys}


def rows_of(scaling: str, case: Case) -> list[dict[str, Any]]:
    """One row of the report per phase, of a series named `scaling`.

    Raises:
      ValueError: there are too few devices.
    """
    mesh = case.mesh(jax.devices())
    rows = []
    for phase, compiled in zip(PHASES, compile_apart(case, mesh), strict=True):
        received = {
            x.kind if x.axis == "context" else f"{x.kind} over {x.axis}": x.bytes
            for x in Program(compiled.as_text()).collectives(dict(mesh.shape))
        }
        parts = expected(case, phase)
        totals = {kind: sum(sizes.values()) for kind, sizes in parts.items()}
        rows.append(
            {
                "scaling": scaling,
                "mode": case.mode,
                "phase": phase,
                "context": case.context,
                "tensor": case.tensor,
                "tokens_per_device": case.tokens,
                "tokens": case.context * case.tokens,
                "expected_bytes": sum(totals.values()),
                "measured_bytes": sum(received.values()),
                "as_expected": received == {kind: size for kind, size in totals.items() if size},
                "terms": {name: size for sizes in parts.values() for name, size in sizes.items()},
                "collectives": received,
            }
        )
    return rows


def memory_of(kind: str, tokens: int) -> dict[str, Any]:
    """Temporaries of one of 1 to 8 devices that hold `tokens` bfloat16 tokens each."""
    rows = []
    for context in (1, 2, 4, GPUS_PER_NODE):
        topology = parse_topology(f"{kind}:{context}")
        for mode in MODES:
            sizes = temporary_bytes(Case(mode, context, tokens, dtype="bfloat16"), topology)
            rows.append(
                {
                    "mode": mode,
                    "context": context,
                    "tokens_per_device": tokens,
                    "temporary_bytes": sizes,
                }
            )
    return {"device": kind, "dtype": "bfloat16", "rows": rows}


def print_report(report: Mapping[str, Any]) -> None:
    """MiB that a device receives, in all and by what for; its temporaries."""
    terms = ("means", "halo", "keys", "gradients")
    titles = "".join(f"{name:>11}" for name in (*terms, "expected", "measured"))
    print(f"{'scaling':8}{'mode':8}{'phase':10}{'context':>8}{'tensor':>7}{'tokens':>9}{titles}")
    for row in report["rows"]:
        sizes = [row["terms"].get(name, 0) for name in terms]
        sizes += [row["expected_bytes"], row["measured_bytes"]]
        print(
            f"{row['scaling']:8}{row['mode']:8}{row['phase']:10}{row['context']:8}"
            f"{row['tensor']:7}{row['tokens']:9}{_mib(sizes)}"
            + ("" if row["as_expected"] else f"  not as expected: {row['collectives']}")
        )
    if memory := report["memory"]:
        print(f"temporaries on {memory['device']}: forward, forward+backward")
        for row in memory["rows"]:
            print(f"{row['mode']:8}{row['context']:8}{_mib(row['temporary_bytes'].values())}")


def _mib(sizes: Iterable[int]) -> str:
    return "".join(f"{size / 2**20:11.2f}" for size in sizes)


def cases(args: argparse.Namespace) -> list[tuple[str, Case]]:
    """With the name of their series."""
    weak = [
        ("weak", Case(mode, context, args.tokens_per_device, tensor))
        for mode in MODES
        for tensor in args.tensor
        for context in args.context
    ]
    strong = [
        ("strong", Case(mode, context, args.tokens // context))
        for mode in MODES
        for context in args.context
    ]
    return weak + strong


def _numbers(text):
    return [int(number) for number in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=_numbers, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--tensor", type=_numbers, default=[1, 2], help="of weak scaling")
    parser.add_argument("--tokens_per_device", type=int, default=32768, help="weak scaling")
    parser.add_argument("--tokens", type=int, default=131072, help="in all, strong scaling")
    parser.add_argument("--memory", choices=["h100"], help="also show temporaries on these")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="FILE.json")
    args = parser.parse_args()
    parts = [args.tokens_per_device, *(args.tokens / context for context in args.context)]
    if broken := [tokens for tokens in parts if tokens % BLOCK_SIZE]:
        parser.error(f"a device's tokens must be a multiple of {BLOCK_SIZE}, got {broken[0]:g}")
    needed = max(args.context) * max(args.tensor)
    if needed > len(jax.devices()):
        parser.error(f"needs JAX_NUM_CPU_DEVICES={needed}, has {len(jax.devices())} devices")
    return args


def main() -> int:
    args = arguments()
    report = {
        "command": " ".join(
            [
                f"JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={len(jax.devices())}",
                "python -m benchmarks.context_scaling",
                *sys.argv[1:],
            ]
        ),
        "geometry": dataclasses.asdict(Geometry()) | {"dtype": Case.dtype},
        "versions": device.versions(),
        "memory": args.memory and memory_of(args.memory, args.tokens_per_device),
        "rows": [row for name, case in cases(args) for row in rows_of(name, case)],
    }
    print_report(report)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    scaling_plot.plot(report, args.out.with_suffix(".png"))
    return 0 if all(row["as_expected"] for row in report["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
