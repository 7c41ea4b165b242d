"""A Hugging Face folder against a checkpoint: names, shapes, dtypes, and every number."""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from convert.hf.config import DTYPE_FIELDS
from convert.hf.directory import HFDirectory
from convert.hf.safetensors import Stored
from convert.models.family import Config
from convert.store import manifest, orbax_stream, tiles
from convert.store.orbax_stream import StoredArray
from convert.weights import layout
from convert.weights.layout import Param
from convert.weights.weight_match import is_tied_copy
from videonsa_jax.errors import UserError
from videonsa_jax.progress import Progress

_NARROW = {  # PyTorch's names of dtypes that do not hold all that a folder may store
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    **dict.fromkeys(("float16", "half"), np.dtype(np.float16)),
}
Arrays = Mapping[str, StoredArray]
Tensors = Mapping[str, Stored]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One tensor whose numbers differ."""

    name: str
    shape: tuple[int, ...]
    unequal: int  # numbers whose bits differ
    largest: float  # absolute difference; infinite where one side is not a finite number
    narrowed: int  # numbers that change when transformers loads them


@dataclasses.dataclass(frozen=True)
class Report:
    """What a comparison of all tensors found."""

    compared: int  # tensors
    problems: Mapping[str, list[str]]  # by kind: names, or lines that say what differs
    differences: list[Difference]  # the largest first
    load_dtype: str  # in which transformers loads all tensors
    narrowed: list[str]  # those whose numbers change thereby
    notes: list[str]  # what differs on purpose
    rounded: str | None  # the checkpoint's dtype, where it is not the folder's

    @property
    def is_one_model(self) -> bool:
        """Whether names, shapes and configs agree."""
        return not any(self.problems.values())

    @property
    def is_equal(self) -> bool:
        """Whether the numbers agree too, bit for bit, in the files and when they are loaded."""
        return self.is_one_model and not self.differences and not self.narrowed


def compare(
    hf: HFDirectory,
    folder: str | pathlib.Path,
    cfg: Config,
    *,
    allow_unexpected: str | None = None,
) -> Report:
    """Compares both sides with the table of parameters, and then with each other, box by box.

    Where dtypes differ, the folder's numbers are rounded as a conversion rounds them.

    Args:
      hf: one side.
      folder: of the checkpoint.
      cfg: of the checkpoint.
      allow_unexpected: tensors whose whole name this expression matches are no problem.

    Raises:
      UserError: a side cannot be read.
    """
    _, arrays = orbax_stream.stored_params(folder)
    params, ignored, notes = _expected(hf, folder, cfg)
    ignored |= _allowed(hf.tensors, allow_unexpected)
    paths = {param.row.jax for param in params}
    names = {name for param in params for name in param.row.names()}
    shapes = {param.row.jax: _shape_problems(param, arrays, hf.tensors) for param in params}
    config, config_notes = _config_problems(hf, cfg)
    problems = {
        f"missing in {hf.path}": sorted(names - hf.tensors.keys()),
        f"unexpected in {hf.path}": sorted(hf.tensors.keys() - names - ignored),
        f"missing in {folder}": sorted(paths - arrays.keys()),
        f"unexpected in {folder}": sorted(arrays.keys() - paths - ignored),
        "of another shape": [line for lines in shapes.values() for line in lines],
        "of another config": config,
    }
    whole = [param for param in params if _is_whole(param, arrays, hf.tensors)]
    whole = [param for param in whole if not shapes[param.row.jax]]
    dtypes = _dtype_changes(whole, arrays, hf.tensors)
    notes += [
        f"{n} tensors are {here}, {there} in {hf.path}" for (there, here), n in dtypes.items()
    ]
    load_dtype = _load_dtype(hf)
    loaded = _NARROW.get(load_dtype)
    with Progress("verify", _bytes(whole, hf.tensors), unit="bytes") as progress:
        found = [
            difference
            for param in whole
            for difference in _differences(param, arrays, hf.tensors, loaded, progress)
        ]
    differences = [x for x in found if x.unequal]
    return Report(
        compared=sum(len(param.row.names()) for param in whole),
        problems=problems,
        differences=sorted(differences, key=lambda x: (x.largest, x.unequal), reverse=True),
        load_dtype=load_dtype,
        narrowed=sorted(x.name for x in found if x.narrowed),
        notes=notes + config_notes,
        rounded=next((here for _, here in dtypes), None),
    )


def _expected(
    hf: HFDirectory, folder: str | pathlib.Path, cfg: Config
) -> tuple[list[Param], set[str], list[str]]:
    """What both sides should hold, what only one side may hold, and notes on the latter."""
    family, ignored, notes = hf.family, set(), []
    params, own = layout.params(family.whole, cfg), {row.jax for row in family.rows(cfg)}
    lacking = [param.row for param in params if param.row.jax not in own]
    held = any(name in hf.tensors for row in lacking for name in row.names())
    origin = manifest.read(folder)
    if lacking and not held and origin is not None and origin.gates == "initialised":
        ignored |= {row.jax for row in lacking}
        params = [param for param in params if param.row.jax in own]
        notes.append(
            f"the {family.lacks.what} were initialised by the conversion; there is nothing to "
            "compare"
        )
    for name, of in family.tied(cfg).items():
        copy, original = hf.tensors.get(name), hf.tensors.get(of)
        if copy and original and is_tied_copy(copy, original):
            ignored.add(name)
            notes.append(f"{name} repeats {of}, to which it is tied")
    return params, ignored, notes


def _allowed(tensors: Tensors, pattern: str | None) -> set[str]:
    try:
        return {name for name in tensors if pattern is not None and re.fullmatch(pattern, name)}
    except re.error as error:
        raise UserError(f"--allow-unexpected={pattern}: {error}") from error


def _shape_problems(param: Param, arrays: Arrays, tensors: Tensors) -> list[str]:
    path, wanted = param.row.jax, param.torch_shape
    lines = [
        f"{name} is {list(tensors[name].shape)}, expected {list(wanted)}"
        for name in param.row.names()
        if name in tensors and tensors[name].shape != wanted
    ]
    if path in arrays and arrays[path].shape != param.shape:
        lines.append(f"{path} is {list(arrays[path].shape)}, expected {list(param.shape)}")
    return lines


def _is_whole(param: Param, arrays: Arrays, tensors: Tensors) -> bool:
    return param.row.jax in arrays and all(name in tensors for name in param.row.names())


def _dtype_changes(
    params: list[Param], arrays: Arrays, tensors: Tensors
) -> Mapping[tuple[str, str], int]:
    """{(there, here): how many tensors}, without those that are equal."""
    pairs = collections.Counter(
        (tensors[name].dtype.name, arrays[param.row.jax].dtype.name)
        for param in params
        for name in param.row.names()
    )
    return {pair: count for pair, count in pairs.items() if len(set(pair)) == 2}


def _config_problems(hf: HFDirectory, cfg: Config) -> tuple[list[str], list[str]]:
    """Fields that decide what the tensors compute, and notes on those that a run may choose."""
    lines = hf.differing_fields(cfg)
    notes = [lines.pop(name) for name in list(lines) if name.startswith(hf.family.free_fields)]
    return list(lines.values()), notes


def _bytes(params: list[Param], tensors: Tensors) -> int:
    return sum(tensors[name].nbytes for param in params for name in param.row.names())


def _load_dtype(hf: HFDirectory) -> str:
    """What dtype="auto" means to transformers: the config's, or else the first tensor's."""
    named = [hf.config.get(key) for key in DTYPE_FIELDS]
    stored = sorted(hf.tensors.values(), key=lambda x: (x.file.name, x.name))
    return next(str(name) for name in (*named, *(x.dtype for x in stored), "float32") if name)


def _differences(
    param: Param, arrays: Arrays, tensors: Tensors, loaded: np.dtype | None, progress: Progress
) -> Iterator[Difference]:
    """Of the tensors of one parameter, those with numbers that differ, in the file or `loaded`."""
    names, layered = param.row.names(), param.row.layers is not None
    stored = arrays[param.row.jax]
    unequal, narrowed = collections.Counter(), collections.Counter()
    largest = dict.fromkeys(names, 0.0)
    for index, ours in stored.read(stored.boxes(layered=layered)):
        layer, inner = (index[0].start, index[1:]) if layered else (0, index)
        name = names[layer]
        there = param.row.op.to_jax(tensors[name].map())[inner]
        theirs = np.empty(there.shape, there.dtype)
        tiles.assign(theirs, there)
        progress.advance(theirs.nbytes)
        kept = theirs.astype(stored.dtype, copy=False)
        count, most = _difference(kept, ours[0] if layered else ours)
        unequal[name] += count
        largest[name] = max(largest[name], most)
        if loaded not in (None, theirs.dtype):
            with np.errstate(over="ignore"):
                rounded = theirs.astype(loaded).astype(stored.dtype)
            narrowed[name] += _unequal(rounded, kept).sum()
    for name in names:
        if unequal[name] or narrowed[name]:
            shape = tensors[name].shape
            yield Difference(name, shape, unequal[name], largest[name], int(narrowed[name]))


def _difference(theirs: np.ndarray, ours: np.ndarray) -> tuple[int, float]:
    """How many numbers differ in bits, and the largest absolute difference."""
    unequal = _unequal(theirs, ours)
    if not unequal.any():
        return 0, 0.0
    with np.errstate(invalid="ignore"):
        gaps = np.abs(theirs[unequal].astype(np.float64) - ours[unequal].astype(np.float64))
    return int(unequal.sum()), float("inf") if np.isnan(gaps).any() else float(gaps.max())


def _unequal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return a.view(bits) != b.view(bits)
