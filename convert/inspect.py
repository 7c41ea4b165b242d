"""Lists the tensors of a Hugging Face folder, a safetensors file or a checkpoint."""

import argparse
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from convert.hf import directory
from convert.hf.directory import PICKLES
from convert.hf.safetensors import read_header
from convert.store import orbax_stream
from videonsa_jax.errors import UserError


class Line(NamedTuple):
    """One tensor or parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    place: str  # the file that holds it, or its sharding and chunks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m convert inspect`."""
    parser.add_argument(
        "path",
        metavar="PATH",
        help="folder with config.json, safetensors file, folder of weights, or a run's --workdir",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns the exit code.

    Raises:
      UserError: PATH is none of what can be listed.
    """
    print(table(*describe(pathlib.Path(args.path))))
    return 0


def describe(path: pathlib.Path) -> tuple[str, list[Line]]:
    """What the last column is about, and the lines; reads only headers and metadata.

    Raises:
      UserError: there is nothing there, or it is damaged.
    """
    if path.is_file() and path.suffix not in PICKLES:
        return "file", _tensors(read_header(path).values())
    if directory.is_adapter(path):
        return "file of the adapter", _tensors(directory.read_adapter(path).values())
    if path.is_file() or (path / directory.CONFIG).is_file():
        return "file", _tensors(directory.open_hf(path).tensors.values())
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    _, arrays = orbax_stream.stored_params(path)
    return "sharding; chunk", [
        Line(name, x.shape, x.dtype.name, x.nbytes, f"{x.sharding}; {_sizes(x.chunk)}")
        for name, x in arrays.items()
    ]


def table(what: str, lines: Sequence[Line]) -> str:
    """Lines under each other, with their sums."""
    rows = [("name", "shape", "dtype", "bytes", what)]
    rows += [(x.name, _sizes(x.shape), x.dtype, f"{x.nbytes:,}", x.place) for x in lines]
    numbers = sum(math.prod(x.shape) for x in lines)
    total = sum(x.nbytes for x in lines)
    dtypes = "+".join(sorted({x.dtype for x in lines}))
    rows.append((f"total of {len(lines)}", f"{numbers:,} numbers", dtypes, f"{total:,}", ""))
    name, shape, dtype, nbytes, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        f"{a:<{name}}  {b:<{shape}}  {c:<{dtype}}  {d:>{nbytes}}  {e}".rstrip()
        for a, b, c, d, e in rows
    )


def _tensors(stored) -> list[Line]:
    return [Line(x.name, x.shape, x.dtype.name, x.nbytes, x.file.name) for x in stored]


def _sizes(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
