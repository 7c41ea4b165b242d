"""Shapes of a model's parameters on both sides, and the boxes that they are moved in."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from flax import nnx, traverse_util

from convert.models.family import Config, Family
from convert.weights.table import Row

BOX_BYTES = 64 * 2**20  # moved at once; also the size of a stored chunk


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter: a row of the table with its shape."""

    row: Row
    shape: tuple[int, ...]  # here; the layers, if any, on axis 0

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of one layer."""
        return self.shape if self.row.layers is None else self.shape[1:]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape of each of its tensors."""
        nothing = np.broadcast_to(np.int8(0), self.inner)  # no memory behind it
        return self.row.op.to_torch(nothing).shape

    def rows(self, units: slice) -> slice:
        """A range of `inner` on the axis of `row.op` -> the rows of a tensor."""
        each = self.torch_shape[0] // self.inner[self.row.op.axis]
        return slice(units.start * each, units.stop * each)


@dataclasses.dataclass(frozen=True)
class Box:
    """Some layers of a parameter, or a part of one; rows of its tensors."""

    layers: slice
    units: slice  # of one layer, on the axis of `row.op`

    def index(self, param: Param) -> tuple[slice, ...]:
        """Where it lies in the parameter."""
        inner = [slice(0, size) for size in param.inner]
        inner[param.row.op.axis] = self.units
        return (*inner,) if param.row.layers is None else (self.layers, *inner)


def params(family: Family, cfg: Config) -> list[Param]:
    """The parameters that a family's rows name, in their order; computes nothing."""
    model = nnx.eval_shape(lambda: family.model(cfg, rngs=nnx.Rngs(0)))
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    shapes = {path: x.shape for path, x in traverse_util.flatten_dict(state, sep="/").items()}
    return [Param(row, shapes[row.jax]) for row in family.rows(cfg)]


def boxes(param: Param, itemsize: int) -> Iterator[Box]:
    """Cuts a parameter into boxes of at most `BOX_BYTES`, in the order of its tensors' bytes.

    All but the last of each axis are equal, so that they can be the chunks of a stored array. A
    single row, however large, is not cut.
    """
    depth, count = param.row.layers or 1, param.inner[param.row.op.axis]
    nbytes = math.prod(param.inner) * itemsize
    layers = math.ceil(depth / _parts(depth, depth * nbytes))
    units = math.ceil(count / _parts(count, nbytes))
    for layer in range(0, depth, layers):
        for unit in range(0, count, units):
            yield Box(
                slice(layer, min(layer + layers, depth)), slice(unit, min(unit + units, count))
            )


def _parts(count: int, nbytes: int) -> int:
    """Into how many parts to cut `count` things; even ones where that takes few more of them.

    Powers of two are preferred: meshes cut the same axes, and mostly by powers of two.
    """
    needed = min(max(math.ceil(nbytes / BOX_BYTES), 1), count)
    even = [n for n in range(needed, min(4 * needed, count) + 1) if count % n == 0]
    powers = [n for n in even if n & (n - 1) == 0]
    return (powers or even or [needed])[0]
