"""Converts a Hugging Face folder, of Qwen2.5-VL or VideoNSA, to a checkpoint of this model."""

import argparse
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np

from convert.hf import peft_adapter
from convert.hf.directory import HFDirectory
from convert.models.family import Config
from convert.store import manifest, orbax_stream, partial_output, tiles
from convert.store.manifest import Hashes, Manifest, Record
from convert.store.orbax_stream import Index, LazyArray
from convert.weights import layout, weight_match
from convert.weights.layout import Box, Param
from convert.weights.weight_match import DTYPES, Match
from videonsa_jax.errors import UserError
from videonsa_jax.model.attention_modes import ATTENTION
from videonsa_jax.progress import Progress

CARRIED = "hf"  # folder in a converted checkpoint: config, tokenizer, processor of the source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m convert from-hf`."""
    parser.add_argument("source", metavar="SRC", help="folder of a model or of a LoRA adapter")
    parser.add_argument("--base", metavar="HF_DIR", help="folder of the model that SRC adapts")
    parser.add_argument("destination", metavar="DST", help="folder to make")
    parser.add_argument(
        "--dtype", choices=("keep", *DTYPES), default="keep", help="of the stored weights"
    )
    parser.add_argument(
        "--attention",
        choices=sorted(ATTENTION),
        help="of the stored config; default: released for VideoNSA, paper for Qwen2.5-VL",
    )
    parser.add_argument("--seed", type=int, default=0, help="of gates that the source lacks")
    parser.add_argument(
        "--allow-unexpected", metavar="REGEX", help="leave out unknown tensors of such names"
    )


def run(args: argparse.Namespace) -> int:
    """Converts; returns the exit code.

    Raises:
      UserError: what the user can mend; the destination is then absent, or marked incomplete.
    """
    source = peft_adapter.open_hf(args.source, args.base, report=print)
    cfg = source.family.read_config(source.config, args.attention)
    found = weight_match.match(
        source,
        cfg,
        seed=args.seed,
        allow_unexpected=args.allow_unexpected,
        report=print,
    )
    dtypes = {param.row.jax: _dtype(found, param, args.dtype) for param in found.params}
    with partial_output.new_folder(args.destination) as folder:
        tensors = _write_params(folder, found, cfg, dtypes)
        _carry(source, folder / CARRIED)
        manifest.write(
            folder,
            Manifest(
                source=_describe(source),
                architecture=found.architecture,
                gates=found.gates,
                dtype=args.dtype,
                tensors=tensors,
            ),
        )
    print(
        f"{args.destination}: {len(tensors)} tensors of {source.path} as {len(found.params)} "
        f"parameters, attention {cfg.attention}"
    )
    return 0


def _write_params(
    folder: pathlib.Path, found: Match, cfg: Config, dtypes: dict[str, np.dtype]
) -> dict[str, Record]:
    hashes = Hashes()
    total = sum(tensor.nbytes for tensor in found.tensors.values())
    with Progress("from-hf", total, unit="bytes") as progress:
        arrays = {
            param.row.jax: _lazy(found, param, dtypes[param.row.jax], hashes, progress)
            for param in found.params
        }
        orbax_stream.save_params(folder, arrays, cfg)
    return {
        name: Record(found.tensors[name].shape, dtypes[param.row.jax].name, hashes[name])
        for param in found.params
        for name in param.row.names()
    }


def _dtype(found: Match, param: Param, policy: str) -> np.dtype:
    if policy != "keep":
        return DTYPES[policy]
    first, *others = (found.tensors[name] for name in param.row.names())
    for tensor in others:
        if tensor.dtype != first.dtype:
            raise UserError(
                f"{first.name} is {first.dtype} and {tensor.name} is {tensor.dtype}, but they "
                f"become one array; choose its dtype with --dtype={'|'.join(DTYPES)}"
            )
    return first.dtype


def _lazy(
    found: Match, param: Param, dtype: np.dtype, hashes: Hashes, progress: Progress
) -> LazyArray:
    """One parameter, read from its tensors box by box when it is written."""
    cut = list(layout.boxes(param, dtype.itemsize))
    chunk = tuple(part.stop - part.start for part in cut[0].index(param))

    def boxes() -> Iterator[tuple[Index, np.ndarray]]:
        for box in cut:
            block = _read(found, param, box, dtype, hashes)
            yield box.index(param), block
            progress.advance(block.size * found.tensors[param.row.names()[0]].dtype.itemsize)

    return LazyArray(param.shape, dtype, chunk, boxes)


def _read(found: Match, param: Param, box: Box, dtype: np.dtype, hashes: Hashes) -> np.ndarray:
    """The box, C-contiguous."""
    out = np.empty([part.stop - part.start for part in box.index(param)], dtype)
    layers = out[None] if param.row.layers is None else out
    for layer, name in zip(layers, param.row.names()[box.layers], strict=True):
        part = found.tensors[name].read(param.rows(box.units)).astype(dtype, copy=False)
        hashes.update(name, part)
        tiles.assign(layer, param.row.op.to_jax(part))
    return out


def _carry(source: HFDirectory, folder: pathlib.Path) -> None:
    folder.mkdir()
    for file in source.carried:
        shutil.copyfile(file, folder / file.name)


def _describe(source: HFDirectory) -> dict:
    files = sorted({tensor.file for tensor in source.tensors.values()})
    described = {
        "path": str(source.path.absolute()),
        "files": {file.name: file.stat().st_size for file in files},
    }
    return described if source.base is None else {**described, "base": str(source.base.absolute())}
