"""Copies between memory orders: a transposed matrix tile by tile is several times faster."""

import itertools

import numpy as np

TILE = 128  # numbers along both axes; two tiles fit in a core's caches


def assign(out: np.ndarray, value: np.ndarray) -> None:
    """`out[...] = value`, for arrays of one shape whose memory may run along different axes."""
    rows, columns = _fastest(value), _fastest(out)
    if rows == columns:
        out[...] = value
        return
    steps = [1] * out.ndim
    steps[rows] = steps[columns] = TILE
    cuts = [
        [slice(at, at + step) for at in range(0, size, step)]
        for size, step in zip(out.shape, steps, strict=True)
    ]
    for tile in itertools.product(*cuts):
        out[tile] = value[tile]


def _fastest(x: np.ndarray) -> int:
    """The axis along which neighbours lie closest in memory."""
    strides = [
        abs(stride) if size > 1 else np.inf for stride, size in zip(x.strides, x.shape, strict=True)
    ]
    return int(np.argmin(strides))
