"""Converts a synthetic checkpoint of a published size both ways: time, memory, equality.

    python benchmarks/conversion.py --workdir=DIR --out=FILE.json [--preset=qwen2_5_vl_7b] [--gates]

Writes a Hugging Face folder of random bfloat16 weights file by file, runs `from-hf` and `to-hf` as
processes of their own, compares the hashes of every tensor, and removes all of it. DIR needs about
3.3 times the size of the weights: 55 GB for 7B, whose weights are 16.6 GB.
"""

import argparse
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np

from benchmarks.device import processor_name
from convert import to_hf
from convert.hf import directory
from convert.hf.safetensors import Spec, Stored, create_file
from convert.models import videonsa
from convert.models.family import Family
from convert.models.qwen2_5_vl import family as qwen2_5_vl
from convert.store import manifest
from convert.weights import layout
from videonsa_jax.config.schema import PRESETS, ModelConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
DTYPE = np.dtype(ml_dtypes.bfloat16)
SHARD_BYTES = 5 * 10**9
PIECE = 2**24  # numbers written at once
DISK_FACTOR = 3.3  # source, checkpoint, export, and some room
_CHILD = """
import pathlib, re, sys
from convert.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""  # not rusage of the parent's children: a child's peak there starts at its parent's size
PACKAGES = ("jax", "orbax-checkpoint", "tensorstore", "numpy", "safetensors")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One run of a command."""

    seconds: float
    peak_bytes: int  # of memory, as the kernel counts it
    baseline_bytes: int  # of the same command when it only prints its help


def specs(cfg: ModelConfig, *, gates: bool) -> list[Spec]:
    """The tensors of a model's checkpoint on the hub."""
    return [
        Spec(name, DTYPE, param.torch_shape)
        for param in layout.params(_family(gates=gates), cfg)
        for name in param.row.names()
    ]


def _family(*, gates: bool) -> Family:
    return videonsa.FAMILY if gates else qwen2_5_vl.FAMILY


def synthesize(folder: pathlib.Path, cfg: ModelConfig, *, gates: bool) -> dict[str, str]:
    """Writes a folder of random weights; returns the hash of each tensor."""
    folder.mkdir()
    config = _family(gates=gates).write_config(cfg, dtype=DTYPE.name)
    (folder / directory.CONFIG).write_text(json.dumps(config))
    shards = to_hf.split(specs(cfg, gates=gates), SHARD_BYTES)
    hashes: dict[str, str] = {}
    weight_map = {}
    for name, shard in zip(to_hf.shard_names(len(shards)), shards, strict=True):
        for tensor in create_file(folder / name, shard, {"format": "pt"}).values():
            hashes[tensor.name] = _fill(tensor)
            weight_map[tensor.name] = name
    if len(shards) > 1:
        (folder / directory.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return hashes


def _fill(tensor: Stored) -> str:
    """Pieces, each from a place of its own, of one sequence drawn from N(0, 0.02**2); a hash."""
    drawn = _drawn()
    digest = hashlib.sha256()
    rng = np.random.default_rng(list(tensor.name.encode()))
    out = tensor.map(writable=True).reshape(-1)
    for at in range(0, out.size, PIECE):
        part = out[at : at + PIECE]
        begin = rng.integers(PIECE)
        part[:] = drawn[begin : begin + part.size]
        digest.update(part.view(np.uint8))
    return digest.hexdigest()


@functools.cache
def _drawn() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (0.02 * rng.standard_normal(2 * PIECE, np.float32)).astype(DTYPE)


def measure(*argv: str | os.PathLike) -> Measurement:
    """Runs `python -m convert` in a process of its own.

    Raises:
      subprocess.CalledProcessError: it failed.
    """
    _, baseline = _run([argv[0], "--help"])
    seconds, peak = _run([str(arg) for arg in argv])
    return Measurement(seconds, peak, baseline)


def _run(argv: list[str]) -> tuple[float, int]:
    begin = time.perf_counter()
    command = [sys.executable, "-c", _CHILD, *argv]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return time.perf_counter() - begin, 1024 * int(output.splitlines()[-1])


def compare(hashes: dict[str, str], folder: pathlib.Path) -> None:
    """Raises ValueError where a manifest's hashes are not those of the source."""
    found = manifest.read(folder).tensors
    wrong = [name for name, digest in hashes.items() if found[name].sha256 != digest]
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} of {len(hashes)} tensors differ: {wrong[:3]}")


def convert_both_ways(
    workdir: pathlib.Path, cfg: ModelConfig, *, gates: bool
) -> dict[str, Measurement]:
    """Makes `hf`, `weights` and `back` in a folder; they are the caller's to remove.

    Raises:
      ValueError: a tensor came back changed.
    """
    hashes = synthesize(workdir / "hf", cfg, gates=gates)
    done = {"from-hf": measure("from-hf", workdir / "hf", workdir / "weights")}
    compare(hashes, workdir / "weights")
    done["to-hf"] = measure("to-hf", workdir / "weights", workdir / "back")
    compare(hashes, workdir / "back")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="existing folder")
    parser.add_argument("--preset", choices=PRESETS, default="qwen2_5_vl_7b")
    parser.add_argument("--gates", action="store_true", help="VideoNSA instead of Qwen2.5-VL")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="FILE.json")
    args = parser.parse_args()

    cfg = PRESETS[args.preset]
    tensors = specs(cfg, gates=args.gates)
    size, largest = (f(spec.nbytes for spec in tensors) for f in (sum, max))
    free = shutil.disk_usage(args.workdir).free
    if free < DISK_FACTOR * size:
        sys.exit(f"{args.workdir} has {free:,} bytes free, expected {int(DISK_FACTOR * size):,}")
    load = os.getloadavg()[0]  # of others: how far the times can be trusted
    work = args.workdir / f"conversion-{os.getpid()}"
    work.mkdir()
    try:
        done = convert_both_ways(work, cfg, gates=args.gates)
        stored = sum(file.stat().st_size for file in (work / "weights").rglob("*"))
    finally:
        shutil.rmtree(work)
    limit = int(1.5 * largest) + 2**30
    for verb, x in done.items():
        print(
            f"{verb:8} {size / 1e9:6.2f} GB in {x.seconds:6.1f} s, peak {x.peak_bytes / 2**30:.2f} "
            f"GiB, of which {x.baseline_bytes / 2**30:.2f} GiB is the program; limit "
            f"{limit / 2**30:.2f} GiB"
        )
    result = {
        "device": processor_name(),
        "load_before": load,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "preset": args.preset,
        "gates": args.gates,
        "tensors": len(tensors),
        "bytes": size,
        "stored_bytes": stored,
        "largest_tensor_bytes": largest,
        "limit_bytes": limit,
        "identical": True,  # else an error was raised
        "verbs": {verb: dataclasses.asdict(x) for verb, x in done.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if any(x.peak_bytes > limit for x in done.values()):
        sys.exit("a conversion took more memory than the limit")


if __name__ == "__main__":
    main()
