"""Which tensor of a Hugging Face folder fills which parameter, checked by name, shape and dtype."""

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import ml_dtypes
import numpy as np

from convert.hf.directory import CONFIG, HFDirectory
from convert.hf.safetensors import Spec, Stored
from convert.models.family import Config
from convert.weights import layout
from convert.weights.layout import Param
from videonsa_jax.errors import UserError
from videonsa_jax.model.layers import INIT_STDDEV

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
FLOATS = (*DTYPES.values(), np.dtype(np.float16))


@dataclasses.dataclass(frozen=True)
class Drawn(Spec):
    """A tensor that is drawn anew: a weight from N(0, 0.02**2), a bias of zeros."""

    seed: int

    def read(self, rows: slice | None = None) -> np.ndarray:
        """The same numbers for the same seed, however the rows are cut."""
        if self.name.endswith(".bias"):
            value = np.zeros(self.shape, self.dtype)
        else:
            rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode())])
            value = INIT_STDDEV * rng.standard_normal(self.shape, np.float32)
        return (value if rows is None else value[rows]).astype(self.dtype)

    map = read


@dataclasses.dataclass(frozen=True)
class Match:
    """All that a model's parameters are made of."""

    params: list[Param]
    tensors: dict[str, Stored | Drawn]  # by canonical name; those of all rows and no others
    architecture: str  # name of the family whose tensors the folder has
    gates: Literal["source", "initialised"]  # where those that the family lacks come from


def match(
    source: HFDirectory,
    cfg: Config,
    *,
    seed: int,
    allow_unexpected: str | None = None,
    report: Callable[[str], None],
) -> Match:
    """Finds each parameter's tensors; draws what a folder of its family lacks.

    Args:
      source: of any family.
      cfg: the model that its config describes.
      seed: of what is drawn.
      allow_unexpected: tensors whose whole name this expression matches are left out.
      report: called with a line for everything that the user should know.

    Raises:
      UserError: tensors are missing or unexpected, or have another shape or dtype.
    """
    tensors: dict[str, Stored | Drawn] = dict(source.tensors)
    family, whole = source.family, source.family.whole
    tied = family.tied(cfg)
    copies = {name: tensors.pop(name) for name in tied if name in tensors}
    params = layout.params(whole, cfg)
    shapes = {name: param.torch_shape for param in params for name in param.row.names()}
    own = {name for row in family.rows(cfg) for name in row.names()}
    _drop_unexpected(source, tensors, shapes, allow_unexpected, report)
    drawn = [] if tensors.keys() - own else [name for name in shapes if name not in own]
    missing = sorted(shapes.keys() - tensors.keys() - set(drawn))
    if missing:
        raise UserError(
            f"{source.path}: {len(missing)} tensors of the model that {CONFIG} describes are "
            f"missing: {_few(missing)}"
        )
    for name, tensor in tensors.items():
        _check(tensor, shapes[name])
    for name, copy in copies.items():
        if not is_tied_copy(copy, tensors[tied[name]]):
            raise UserError(
                f"{source.path}: {name} differs from {tied[name]}, but {CONFIG} says they are "
                "tied; correct tie_word_embeddings"
            )
        report(f"{name} is left out: it equals {tied[name]}, which it is tied to")
    if drawn:
        dtype = tensors[next(iter(shapes))].dtype
        tensors |= {name: Drawn(name, dtype, shapes[name], seed) for name in drawn}
        report(
            f"{source.path} has no {family.lacks.what}: {len(drawn)} tensors are initialised, "
            f"weights from N(0, {INIT_STDDEV}) with seed {seed}, biases 0"
        )
    elif family.lacks is not None:
        report(
            f"{source.path} holds {family.lacks.what} although its {CONFIG} describes a model "
            "without them"
        )
    if drawn:
        return Match(params, tensors, family.name, "initialised")
    return Match(params, tensors, whole.name, "source")


def is_tied_copy(copy: Stored, original: Stored) -> bool:
    """Whether a stored copy repeats the tensor that it is tied to, bit for bit."""
    if (copy.dtype, copy.shape) != (original.dtype, original.shape):
        return False
    bits = np.dtype(f"u{copy.dtype.itemsize}")
    step = max(layout.BOX_BYTES * original.shape[0] // original.nbytes, 1)
    parts = (slice(first, first + step) for first in range(0, original.shape[0], step))
    return all(
        np.array_equal(copy.read(rows).view(bits), original.read(rows).view(bits)) for rows in parts
    )


def _drop_unexpected(
    source: HFDirectory,
    tensors: dict[str, Stored | Drawn],
    shapes: Mapping[str, tuple[int, ...]],
    allowed: str | None,
    report: Callable[[str], None],
) -> None:
    unexpected = sorted(tensors.keys() - shapes.keys())
    try:
        left_out = [name for name in unexpected if allowed and re.fullmatch(allowed, name)]
    except re.error as error:
        raise UserError(f"--allow-unexpected={allowed}: {error}") from error
    if left := [name for name in unexpected if name not in left_out]:
        raise UserError(
            f"{source.path}: {len(left)} tensors are not of the model that {CONFIG} describes: "
            f"{_few(left)}; leave them out with --allow-unexpected=REGEX"
        )
    for name in left_out:
        del tensors[name]
    if left_out:
        report(f"{len(left_out)} unexpected tensors are left out: {_few(left_out)}")


def _check(tensor: Stored, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UserError(
            f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}, expected {shape}; "
            f"its {CONFIG} describes a model of another size"
        )
    if tensor.dtype not in FLOATS:
        expected = ", ".join(dtype.name for dtype in FLOATS)
        raise UserError(
            f"{tensor.file}: tensor {tensor.name!r} has dtype {tensor.dtype}, expected one of "
            f"{expected}; quantised weights cannot be converted"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
