"""Times native sparse attention against dense attention on this machine.

    python benchmarks/attention.py --backward --out=FILE.json [--baselines=PYTHON]

Everything runs in one process, in turns, on the same inputs, after it was compared with its
reference at a small size. On a CPU: `xla` sparse attention and `xla` dense attention. On a GPU:
`triton` sparse attention, its parts, and decoding, against cuDNN's dense attention; with
--baselines, that Python then times public kernels on the same card (see timing/baselines.py).
Prints a table; writes FILE.json and, beside it, FILE.png.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device import device_name, gpu_state, versions
from benchmarks.inputs import BLOCK_SIZE, INPUTS, WINDOW_SIZE
from benchmarks.timing import external_python, programs, roofline, table
from benchmarks.timing.interleaved import interleaved
from pallas_kernels import NSASpec

LIMITS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # relative errors
CHECKED = 1000  # tokens
FEW = NSASpec(BLOCK_SIZE, 4, WINDOW_SIZE)  # leaves a choice at that length
WITH_UNION = ("nsa", "selected_attention")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is run on a kind of device, by default."""

    implementation: str
    tokens: str
    dtype: str
    checked: tuple[str, ...]  # dtypes compared with the references
    sources: tuple[str, ...]  # inputs
    programs: Callable
    roof: Callable


MACHINES = {
    "cpu": Machine(
        implementation="xla",
        tokens="4096,8192,16384,32768",
        dtype="float32",
        checked=("float32",),
        sources=("video",),
        programs=programs.cpu_programs,
        roof=roofline.cpu_roof,
    ),
    "gpu": Machine(
        implementation="triton",
        tokens="8192,16384,32768,65536,131072",
        dtype="bfloat16",
        checked=("float32", "bfloat16"),
        sources=tuple(INPUTS),
        programs=programs.gpu_programs,
        roof=roofline.gpu_roof,
    ),
}


def check(implementation, dtype):
    """Raises ValueError if an operation or a gradient is off its reference."""
    arrays = tuple(jnp.asarray(x, dtype) for x in INPUTS["video"](CHECKED))
    for op in (functools.partial(programs.nsa, spec=FEW), programs.dense):
        ours, theirs = (
            jax.jit(programs.forward_backward(functools.partial(op, implementation=name)))(*arrays)
            for name in (implementation, "reference")
        )
        for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            got, want = (np.asarray(x, np.float32) for x in (got, want))
            error = float(np.linalg.norm(got - want) / (np.linalg.norm(want) + 1e-30))
            if not error <= LIMITS[dtype]:
                raise ValueError(
                    f"{implementation} in {dtype}: error {error:.1e} against the reference is "
                    f"above {LIMITS[dtype]:.0e}"
                )


def check_repeats(dtype):
    """Raises ValueError if two runs of Triton's sparse attention differ in any bit."""
    arrays = tuple(jnp.asarray(x, dtype) for x in INPUTS["random"](CHECKED)[:4])
    run = jax.jit(functools.partial(programs.nsa, spec=FEW, implementation="triton"))
    if not np.array_equal(run(*arrays), run(*arrays)):
        raise ValueError(f"two runs of triton in {dtype} differ")


def selection(source, tokens, args, implementation):
    """Blocks per query and KV head: mean chosen, mean in the union of one tile of queries."""
    arrays = programs.inputs(source, tokens, args)
    bits = programs.chosen_blocks(arrays, implementation).bits
    queries = programs.queries_per_tile(arrays, implementation)
    whole = bits[:, : bits.shape[1] // queries * queries]
    union = jax.lax.reduce(
        whole.reshape(1, -1, queries, *bits.shape[2:]), jnp.uint32(0), jax.lax.bitwise_or, (2,)
    )
    count = functools.partial(jnp.sum, axis=-1)
    return tuple(
        float(count(jax.lax.population_count(x).astype(jnp.int32)).mean()) for x in (bits, union)
    )


def rows_of(timed, selections, roof, args):
    """One row per program.

    Args:
      timed: [(program, milliseconds of each run)].
      selections: {(input, tokens): `selection`}.
      roof: what the machine does at best.
      args: of the command line.
    """
    medians = {(p.name, p.case): float(np.median(samples)) for p, samples in timed}
    rows = []
    for program, samples in timed:
        median = medians[program.name, program.case]
        chosen, union = selections.get((program.source, program.tokens), (0.0, None))
        work = 3.5 if program.phase == "forward+backward" else 1.0  # the backward has 5 products
        flops = work * program.rows * roofline.useful_flops(program.name, program.tokens, chosen)
        rows.append(
            {
                "what": program.what,
                "tokens": program.tokens,
                "input": f"{program.source}, seed {args.seed}, {args.dtype}",
                "mean_union": union if program.name in WITH_UNION else None,
                "ms_median": median,
                "ms_p10": float(np.percentile(samples, 10)),
                "ms_p90": float(np.percentile(samples, 90)),
                "ratio_to_dense": medians[program.baseline, program.case] / median,
                "roofline_fraction": 1e3 * roof.seconds(flops, program.moved) / median,
            }
        )
    return sorted(rows, key=lambda row: row["tokens"])


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backward", action="store_true", help="also time forward + backward")
    parser.add_argument(
        "--tokens", help="multiples of 64, by comma; default: 4K to 32K, GPU: 8K to 128K"
    )
    parser.add_argument("--dtype", choices=LIMITS, help="default: float32, GPU: bfloat16")
    parser.add_argument("--rounds", type=int, default=20, help="runs of each, taking turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--baselines", metavar="PYTHON", help="has public kernels, see baselines.py"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="FILE.json")
    return parser.parse_args()


def main():
    args = arguments()
    # First, while JAX does not hold the card's memory yet.
    baselines = external_python.run(
        args.baselines, args.tokens or MACHINES["gpu"].tokens, args.seed
    )
    name = jax.default_backend()
    if name not in MACHINES:
        raise SystemExit(f"nothing to time on {name!r}; devices are {sorted(MACHINES)}")
    machine = MACHINES[name]
    args.dtype = args.dtype or machine.dtype
    lengths = [int(tokens) for tokens in (args.tokens or machine.tokens).split(",")]

    for dtype in machine.checked:
        check(machine.implementation, dtype)
        if machine.implementation == "triton":
            check_repeats(dtype)
    roof = machine.roof(args.dtype)
    print(
        f"{device_name()}; roof {roof}; errors against the references below "
        + ", ".join(f"{LIMITS[dtype]:.0e} in {dtype}" for dtype in machine.checked)
    )
    before = gpu_state()
    phases = programs.PHASES[: 1 + args.backward]
    timed = [p for tokens in lengths for p in machine.programs(tokens, phases, args)]
    timed = list(zip(timed, interleaved(timed, args.rounds), strict=True))
    after = gpu_state()
    selections = {
        (source, tokens): selection(source, tokens, args, machine.implementation)
        for source in machine.sources
        for tokens in lengths
    }
    rows = rows_of(timed, selections, roof, args)
    table.print_rows(rows)
    report = {
        "device": device_name(),
        "versions": versions(),
        "rows": rows,
    }
    if before:
        report |= {"gpu": {"before": before, "after": after}}
    if baselines:
        report |= {"baselines": baselines}
        table.print_rows(baselines["rows"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    table.plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
