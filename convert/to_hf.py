"""Writes a checkpoint of this model as a Hugging Face folder that transformers loads."""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

from convert.from_hf import CARRIED
from convert.hf import directory
from convert.hf.safetensors import Spec, Stored, create_file
from convert.models import registry
from convert.models.family import Config, Family
from convert.store import manifest, orbax_stream, partial_output, tiles
from convert.store.manifest import Manifest, Record
from convert.store.orbax_stream import StoredArray
from convert.weights import layout, lora_merge
from convert.weights.layout import Param
from convert.weights.lora_merge import Adapter
from convert.weights.weight_match import DTYPES
from videonsa_jax.errors import UserError
from videonsa_jax.progress import Progress
from videonsa_jax.training import checkpoint

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that has been looked at but not read."""

    params: list[Param]  # of the family that is written
    arrays: dict[str, StoredArray]
    adapters: dict[str, Adapter]  # to be added to arrays
    specs: list[Spec]  # the tensors to write, in their order
    origin: dict[str, Any]  # for the manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m convert to-hf`."""
    parser.add_argument("source", metavar="SRC", help="folder of weights, or a run's --workdir")
    parser.add_argument("destination", metavar="DST", help="folder to make")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a file, for example 5GB"
    )
    parser.add_argument(
        "--architecture",
        choices=("auto", *registry.FAMILIES),
        default="auto",
        help="of the folder; one without gates leaves them out; auto: what untrained weights were "
        "converted from, else VideoNSA",
    )
    parser.add_argument(
        "--dtype", choices=("keep", *DTYPES), default="keep", help="of the written weights"
    )
    parser.add_argument(
        "--files",
        metavar="HF_DIR",
        help="folder of the tokenizer, processor and config.json to carry along; default: those "
        "that SRC was converted with",
    )


def run(args: argparse.Namespace) -> int:
    """Converts; returns the exit code.

    Raises:
      UserError: what the user can mend; the destination is then absent, or marked incomplete.
    """
    limit = parse_size(args.max_shard_size)
    made_by = manifest.read(args.source)
    family = registry.of_checkpoint(args.source)
    cfg = checkpoint.load_model_config(args.source, family.config_class)
    if args.architecture != "auto":
        asked = registry.FAMILIES[args.architecture]
        if asked.whole is not family.whole:
            raise UserError(f"--architecture={asked.name}: {args.source} holds {family.name}")
        family = asked
    source = _open_source(args.source, family, cfg, args.dtype)
    carried = _carried_folder(args.source, args.files)
    config = family.write_config(
        cfg,
        dtype=_load_dtype(source.specs),
        carried=None if carried is None else directory.read_config(carried),
    )
    with partial_output.new_folder(args.destination) as folder:
        files = _create_files(folder, source.specs, limit)
        tensors = _write_tensors(source, files)
        _write_json(folder / directory.CONFIG, config)
        if carried is not None:
            _carry(carried, folder)
        gates = "source" if made_by is None else made_by.gates
        made = Manifest(source.origin, family.name, gates, args.dtype, tensors)
        manifest.write(folder, made)
    _report(args, family, gates, source, carried)
    return 0


def parse_size(text: str) -> int:
    """`5GB`, `200MiB` or a number of bytes.

    Raises:
      UserError: it is none of them.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text)
    if not match or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise UserError(f"--max-shard-size={text} must be a size like 5GB, 200MB or 4GiB")
    return math.ceil(float(match[1]) * _UNITS[match[2].upper()])


def shard_names(count: int) -> list[str]:
    """The hub's names of a model's files."""
    if count == 1:
        return [directory.WEIGHTS]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def split(specs: Sequence[Spec], limit: int) -> list[list[Spec]]:
    """Parts of at most `limit` bytes, or of one tensor that is larger."""
    shards, size = [[]], 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _open_source(folder: str, family: Family, cfg: Config, policy: str) -> Source:
    step, stored = orbax_stream.stored_params(folder)
    arrays, merged = lora_merge.split(stored, getattr(cfg, "lora", None))
    params = layout.params(family.whole, cfg)
    expected = {param.row.jax: param.shape for param in params}
    found = {path: array.shape for path, array in arrays.items()}
    if wrong := sorted(dict(expected.items() ^ found.items())):
        raise UserError(
            f"{folder}: parameter {wrong[0]} is {found.get(wrong[0], 'missing')}, expected "
            f"{expected.get(wrong[0], 'none')} by its config; the checkpoint is damaged"
        )
    written = {row.jax for row in family.rows(cfg)}
    params = [param for param in params if param.row.jax in written]
    specs = []
    for param in params:
        dtype = arrays[param.row.jax].dtype if policy == "keep" else DTYPES[policy]
        specs += [Spec(name, dtype, param.torch_shape) for name in param.row.names()]
    specs.sort(key=lambda spec: _natural_order(spec.name))
    origin = {"path": str(pathlib.Path(folder).absolute()), "step": step}
    return Source(params, arrays, merged, specs, origin)


def _natural_order(name: str) -> list[tuple[bool, int, str]]:
    """Layer 10 comes after layer 9."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _create_files(folder: pathlib.Path, specs: Sequence[Spec], limit: int) -> dict[str, Stored]:
    """The files, and the index if there are several."""
    shards = split(specs, limit)
    stored: dict[str, Stored] = {}
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        stored |= create_file(folder / name, shard, {"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
            "weight_map": {name: tensor.file.name for name, tensor in stored.items()},
        }
        _write_json(folder / directory.INDEX, index)
    return stored


def _write_tensors(source: Source, files: dict[str, Stored]) -> dict[str, Record]:
    """Fills the files parameter by parameter; hashes each tensor once it is complete."""
    total = sum(tensor.nbytes for tensor in files.values())
    with (
        Progress("to-hf", total, unit="bytes") as progress,
        concurrent.futures.ThreadPoolExecutor(max_workers=1) as hasher,
    ):
        hashes = {}
        for param in source.params:
            path = param.row.jax
            _write_param(param, source.arrays[path], source.adapters.get(path), files, progress)
            for name in param.row.names():
                hashes[name] = hasher.submit(manifest.sha256, files[name])
        for file in sorted({tensor.file for tensor in files.values()}):
            _flush(file)  # an error of the disk shows here, not after the folder got its name
        return {
            name: Record(tensor.shape, tensor.dtype.name, hashes[name].result())
            for name, tensor in files.items()
        }


def _write_param(
    param: Param,
    array: StoredArray,
    adapter: Adapter | None,
    files: dict[str, Stored],
    progress: Progress,
) -> None:
    names, layered = param.row.names(), param.row.layers is not None
    for index, block in array.read(array.boxes(layered=layered)):
        block = block if adapter is None else adapter.add(index, block)
        layer, inner = (index[0].start, index[1:]) if layered else (0, index)
        tensor = files[names[layer]]
        view = param.row.op.to_jax(tensor.map(writable=True))
        tiles.assign(view[inner], block[0] if layered else block)
        progress.advance(block.size * tensor.dtype.itemsize)


def _flush(file: pathlib.Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _load_dtype(specs: Sequence[Spec]) -> str:
    """The narrowest dtype that holds all tensors: transformers loads all in the config's."""
    dtypes = {spec.dtype.name for spec in specs}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _carried_folder(source: str, given: str | None) -> pathlib.Path | None:
    if given is not None:
        return pathlib.Path(given)
    own = pathlib.Path(source) / CARRIED
    return own if own.is_dir() else None


def _carry(folder: pathlib.Path, to: pathlib.Path) -> None:
    for file in directory.carried_files(folder):
        if file.name != directory.CONFIG:
            shutil.copyfile(file, to / file.name)


def _write_json(file: pathlib.Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def _report(
    args: argparse.Namespace,
    family: Family,
    gates: str,
    source: Source,
    carried: pathlib.Path | None,
) -> None:
    what = f"{len(source.specs)} tensors of step {source.origin['step']} of {args.source}"
    print(f"{args.destination}: {what}, architecture {family.name}")
    if source.adapters:
        print(f"{len(source.adapters)} adapters are merged into their weights")
    if family.lacks is not None:
        kind = "their initial values" if gates == "initialised" else "trained ones"
        what = family.lacks.what
        print(f"the {what} are left out: {family.architecture} has none; they had {kind}")
    if carried is None:
        print("no tokenizer and processor files are written; --files=HF_DIR names some")
