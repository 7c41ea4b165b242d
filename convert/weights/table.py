"""Weight names and layouts, PyTorch <-> JAX: declared once as rows, read in both directions."""

import math
from collections.abc import Callable
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
