"""Compares sharding strategies on devices that are not there: does it fit, and what would it cost?

make sharding-report CONFIG=configs/X.py TOPOLOGY=v5p:4x4x4 STRATEGY=fsdp,fsdp_tp,fsdp_cp OUT=DIR

runs `python -m videonsa_jax.aot.report` in `.venv-aot`, whose JAX compiles for such devices.
Each strategy, a preset of `rules.PRESETS` with sizes of mesh axes after it if need be
(`fsdp_cp:context=8`), is compiled as `train.py` would, or as a prefill with `--phase=prefill`, with
one full row at a time for each group of devices that shares a row. Prints a ranking and writes
report.json, report.csv and report.png. `--sweep` tries each named preset on every mesh.

The memory and the exchanges are the compiler's. The time is a bound from below, of peak rates that
hide each other completely: the largest of the arithmetic that runs, of everything that is written
to memory and read once, and of the bytes that a device receives over its links. Nothing is run.
"""

import csv
import dataclasses
import importlib.metadata
import json
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
from absl import app, flags

from videonsa_jax.aot import plot, programs
from videonsa_jax.aot.compile import HEADROOM, CompilationError, aot_compile, memory
from videonsa_jax.aot.estimate import Kinds, Times, estimate, kinds_of_memory
from videonsa_jax.aot.flops import row_flops
from videonsa_jax.aot.hlo import Collective, Program
from videonsa_jax.aot.programs import RowShape
from videonsa_jax.aot.strategy import Strategy, factorisations, parse_strategy
from videonsa_jax.aot.topology import ToolchainMissing, Topology, parse_topology
from videonsa_jax.config import parse
from videonsa_jax.config.run import RunConfig
from videonsa_jax.errors import UserError

MISSING = 3  # exit code: this machine cannot compile for the devices
NEW_TOKENS = 128  # of a prefill's cache


@dataclasses.dataclass(frozen=True)
class Row:
    """One strategy, compiled.

    Attributes:
      strategy: name, with the sizes that were asked for.
      mesh: devices along each axis.
      rows: of a step, over all devices.
      bytes_per_device: by kind; their sum is "total".
      device_bytes: what the device has.
      fits: leaves `HEADROOM` of it free.
      flops: that a device executes in matrix products and attention.
      collectives: None where it was not compiled to the end.
      times: None likewise.
      compile_s: seconds.
      problem: what the compiler said, if it refused.
    """

    strategy: str
    mesh: dict[str, int]
    rows: int
    bytes_per_device: dict[str, int]
    device_bytes: int
    fits: bool
    flops: float
    collectives: list[Collective] | None
    times: Times | None
    compile_s: float
    problem: str | None = None

    def as_dict(self) -> dict:
        """As in the JSON file."""
        row = dataclasses.asdict(self)
        times = row.pop("times") or dict.fromkeys(f.name for f in dataclasses.fields(Times))
        return row | times


def compile_row(
    cfg: RunConfig, topology: Topology, strategy: Strategy, phase: str, tokens: tuple[int, int]
) -> Row:
    """Compiles `cfg` under a strategy.

    Args:
      cfg: model, optimizer and computation.
      topology: the devices.
      strategy: replaces the mesh and the rules of `cfg`.
      phase: "train" or "prefill".
      tokens: vision and text tokens of a row.

    Raises:
      ToolchainMissing: this machine cannot compile for them.
      UserError: the strategy splits something unevenly.
    """
    cfg = dataclasses.replace(cfg, mesh=strategy.mesh, sharding=strategy.rules)
    shape = RowShape(strategy.row_groups, *tokens)
    if phase == "train":
        shape = dataclasses.replace(shape, rows=shape.rows * cfg.optim.grad_accum_steps)
    cfg = programs.of_rows(cfg, shape)
    mesh = topology.mesh(cfg.mesh)
    frame = programs.abstract_batch(cfg, mesh, shape).frame_patches
    flops = row_flops(
        cfg.model, vision_tokens=tokens[0], text_tokens=tokens[1], frame_patches=frame
    )
    begin, problem, use, collectives, times = time.perf_counter(), None, None, None, None
    with jax.sharding.use_abstract_mesh(topology.tracing(mesh)):
        if phase == "train":
            lowered = programs.training_step(cfg, mesh, shape)
        else:
            lowered = programs.prefill_step(cfg, mesh, shape, NEW_TOKENS)
        kinds = kinds_of_memory(cfg, mesh, shape, phase)
        share = shape.rows / topology.size
        needed, executed = (share * x for x in _flops(flops, phase, cfg.compute.remat))
        try:
            compiled = aot_compile(lowered, topology.compiler_options)
        except CompilationError as error:
            problem = str(error)
            total = error.needed_bytes
        else:
            use = memory(compiled)
            total = use.total
            program = Program(compiled.as_text())
            collectives = program.collectives(dict(mesh.shape))
            written = program.written_bytes()
            times = estimate(topology.chip, needed, executed, written, collectives)
    return Row(
        strategy=strategy.name,
        mesh=dict(mesh.shape),
        rows=shape.rows,
        bytes_per_device=_by_kind(kinds, use, total),
        device_bytes=topology.chip.memory_bytes,
        fits=problem is None and total <= (1 - HEADROOM) * topology.chip.memory_bytes,
        flops=executed,
        collectives=collectives,
        times=times,
        compile_s=round(time.perf_counter() - begin, 1),
        problem=problem,
    )


def _flops(flops, phase, remat):
    """-> what the result needs, and what runs: the forward pass again where it is recomputed."""
    if phase == "prefill":
        return flops.forward, flops.forward
    again = flops.forward if remat in ("full", "save_selection") else 0
    return flops.training, flops.training + again


def _by_kind(kinds: Kinds, use, total):
    """What the compiler planned, less what is known by name: the rest is temporary."""
    by_kind = dataclasses.asdict(kinds)
    by_kind["outputs"] = use.outputs if use else 0
    known = sum(by_kind.values())
    by_kind["temporaries"] = max(total - known, 0) if total is not None else 0
    return by_kind | {"total": total if total is not None else known}


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Those that fit first, the highest MFU first; then the others, by how little they lack."""

    def key(row):
        mfu = row.times.mfu if row.times else 0
        return not row.fits, -mfu if row.fits else row.bytes_per_device["total"]

    return sorted(rows, key=key)


def describe(rows: Sequence[Row]) -> str:
    """A table, best first."""
    lines = [
        f"{'strategy':<28} {'mesh':<34} {'rows':>5} {'GiB':>7} {'of':>6} {'fits':>9} "
        f"{'received GB':>11} {'step s':>7} {'MFU':>5} limit"
    ]
    for row in rows:
        mesh = " ".join(f"{axis}={size}" for axis, size in row.mesh.items() if size > 1)
        total = row.bytes_per_device["total"]
        over = total - row.device_bytes
        fits = "yes" if row.fits else f"+{over / 2**30:.1f} GiB" if over > 0 else "barely"
        line = f"{row.strategy:<28} {mesh:<34} {row.rows:5} {total / 2**30:7.2f} "
        line += f"{row.device_bytes / 2**30:6.2f} {fits:>9} "
        if row.times:
            received = sum(x.bytes for x in row.collectives) / 1e9
            line += f"{received:11.1f} {row.times.step_s:7.2f} {row.times.mfu:5.0%} "
            line += row.times.limit
        lines.append(line.rstrip())
    return "\n".join(lines)


def write(report: dict, rows: Sequence[Row], folder: pathlib.Path) -> None:
    """report.json, report.csv and report.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    flat = []
    for row in report["rows"]:
        sizes = {f"{kind}_bytes": size for kind, size in row["bytes_per_device"].items()}
        exchanged = {f"{x['kind']}/{x['axis']}_bytes": x["bytes"] for x in row["collectives"] or ()}
        plain = {
            name: value for name, value in row.items() if not isinstance(value, dict | list | None)
        }
        flat.append(plain | {f"mesh_{k}": v for k, v in row["mesh"].items()} | sizes | exchanged)
    with (folder / "report.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(name for row in flat for name in row)))
        table.writeheader()
        table.writerows(flat)
    tokens = f"{report['vision_tokens']:,} + {report['text_tokens']:,} tokens a row"
    title = f"{report['topology']}, {report['phase']}, {tokens}"
    plot.draw(title, rows, folder / "report.png")


def run(args: flags.FlagValues) -> list[Row]:
    """Compiles what the flags ask for, prints and writes it."""
    cfg = parse.parse(parse.load_config(args.config), args.override)
    topology = parse_topology(args.topology)
    topology.require()
    text, size = cfg.model.text, topology.size
    strategies = [
        strategy
        for name in args.strategy
        for strategy in (
            factorisations(name, size, text) if args.sweep else [parse_strategy(name, size, text)]
        )
    ]
    tokens, rows = (args.vision_tokens, args.text_tokens), []
    about = {
        "config": args.config,
        "override": args.override,
        "topology": topology.name,
        "phase": args.phase,
        "vision_tokens": tokens[0],
        "text_tokens": tokens[1],
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", *topology.chip.packages)
        },
        "rates": {
            name: getattr(topology.chip, name) for name in ("flops", "memory_rate", "link_rate")
        },
    }
    for strategy in strategies:
        try:
            row = compile_row(cfg, topology, strategy, args.phase, tokens)
        except ToolchainMissing:
            raise
        except UserError as error:
            if not args.sweep:
                raise
            print(f"left out {strategy.name}: {error}", flush=True)
            continue
        print(describe([row]).splitlines()[1], f"({row.compile_s} s)", flush=True)
        rows = ranked([*rows, row])
        # After each, as one takes minutes: what is done is kept.
        write(about | {"rows": [row.as_dict() for row in rows]}, rows, pathlib.Path(args.out))
    print(f"\n{describe(rows)}")
    return rows


def main(argv: Sequence[str]) -> None:
    """Reads flags, then compares."""
    del argv
    try:
        run(flags.FLAGS)
    except ToolchainMissing as error:
        print(f"report: cannot compile for {flags.FLAGS.topology} here: {error}", file=sys.stderr)
        sys.exit(MISSING)
    except UserError as error:
        sys.exit(f"report: {error}")


def define_flags() -> None:
    """Not at import, as in `train.py`."""
    parse.define_config_flags()
    flags.DEFINE_string("topology", "h100:8", "devices: h100:8, v5e:16x16, v5p:4x4x4, v6e:16x16")
    flags.DEFINE_list("strategy", ["fsdp", "fsdp_tp", "fsdp_cp"], "names, with :axis=size")
    flags.DEFINE_enum("phase", "train", ["train", "prefill"], "which program")
    flags.DEFINE_integer("vision_tokens", 36_864, "of a row")
    flags.DEFINE_integer("text_tokens", 2_048, "of a row")
    flags.DEFINE_bool("sweep", False, "every mesh of each strategy")
    flags.DEFINE_string("out", None, "folder of the report", required=True)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=lambda argv: flags.FLAGS(parse.override_flags(argv)))
