"""Copies are the same in any memory order."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from convert.store import tiles


@pytest.mark.parametrize("tile", [1, 3, 128])
@pytest.mark.parametrize("shape", [(7,), (1, 1), (5, 1), (5, 7), (4, 3, 5), (2, 3, 4, 5)])
def test_every_order_is_copied(monkeypatch, shape, tile):
    monkeypatch.setattr(tiles, "TILE", tile)
    for theirs, ours in itertools.product(itertools.permutations(range(len(shape))), repeat=2):
        value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape).transpose(theirs)
        out = np.empty([value.shape[axis] for axis in ours], ml_dtypes.bfloat16)
        out = out.transpose(np.argsort(ours))
        tiles.assign(out, value)
        np.testing.assert_array_equal(out, value)


def test_a_range_of_a_larger_array_is_copied():
    value, out = np.arange(20.0).reshape(4, 5), np.zeros((9, 8))
    tiles.assign(out[1:6, 2:6], value.T)
    np.testing.assert_array_equal(out[1:6, 2:6], value.T)
    assert np.count_nonzero(out) == 19
