"""Weight names and layouts, PyTorch <-> JAX: declared once as rows, walked in both directions."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Op(NamedTuple):
    """One layout in both directions; each undoes the other without touching a bit.

    Both only reshape and transpose, and take also a range of rows: rows of the PyTorch tensor, on
    its axis 0, are a range of the JAX array on `axis`.
    """

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]
    axis: int


KEEP = Op(lambda w: w, lambda w: w, 0)
LINEAR = Op(np.transpose, np.transpose, 1)  # [out in] <-> [in out]


def linear(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Op:
    """[prod(outputs) prod(inputs)] <-> [*inputs *outputs]."""
    size = math.prod(inputs)
    return Op(
        lambda w: w.T.reshape(*inputs, -1, *outputs[1:]),
        lambda w: w.reshape(size, -1).T,
        len(inputs),
    )


def vector(shape: tuple[int, ...]) -> Op:
    """[prod(shape)] <-> [*shape]."""
    return Op(lambda w: w.reshape(-1, *shape[1:]), lambda w: w.reshape(-1), 0)


def patch_conv(kernel: tuple[int, ...]) -> Op:
    """[out *kernel] of a convolution whose stride is its size <-> [prod(kernel) out]."""
    return Op(lambda w: w.reshape(len(w), -1).T, lambda w: w.T.reshape(-1, *kernel), 1)


class Row(NamedTuple):
    """One parameter: its name there, its '/'-joined path here, and how the layouts differ."""

    torch: str  # "{l}" stands for the layer number; the layers are stacked on a new axis 0
    jax: str
    op: Op = KEEP
    layers: int | None = None  # how many, iff the name has "{l}"

    def names(self) -> list[str]:
        """The tensors that make up this parameter."""
        if self.layers is None:
            return [self.torch]
        return [self.torch.format(l=layer) for layer in range(self.layers)]


def to_jax(tensors: Mapping[str, np.ndarray], rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Canonical PyTorch names -> '/'-joined paths.

    Raises:
      ValueError: tensors that a row needs are missing, or tensors that no row claims.
    """
    claimed = {name for row in rows for name in row.names()}
    _match(claimed, set(tensors), "tensors")
    return {row.jax: _joined(tensors, row) for row in rows}


def to_torch(params: Mapping[str, np.ndarray], rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """'/'-joined paths -> canonical PyTorch names; the inverse of `to_jax`, bit for bit.

    Raises:
      ValueError: parameters that a row needs are missing, or parameters that no row claims.
    """
    _match({row.jax for row in rows}, set(params), "parameters")
    return {name: tensor for row in rows for name, tensor in _split(params[row.jax], row)}


def _joined(tensors: Mapping[str, np.ndarray], row: Row) -> np.ndarray:
    parts = [row.op.to_jax(tensors[name]) for name in row.names()]
    return parts[0] if row.layers is None else np.stack(parts)


def _split(param: np.ndarray, row: Row) -> Iterator[tuple[str, np.ndarray]]:
    parts = [param] if row.layers is None else param
    for name, part in zip(row.names(), parts, strict=True):
        yield name, row.op.to_torch(part)


def _match(needed: set[str], given: set[str], what: str) -> None:
    if missing := sorted(needed - given):
        raise ValueError(f"{len(missing)} {what} are missing: {_few(missing)}")
    if unclaimed := sorted(given - needed):
        raise ValueError(f"{len(unclaimed)} {what} are claimed by no row: {_few(unclaimed)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
