"""Boxes cover a parameter once, in the order of its tensors, and fit in memory."""

import itertools
import math

import numpy as np
import pytest

from convert.models import videonsa
from convert.weights import layout
from tests import small_models
from videonsa_jax.config.schema import PRESETS


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_boxes_of_published_models_are_even_and_small(preset):
    cfg = PRESETS[preset]
    for param in layout.params(videonsa.FAMILY, cfg):
        first, *others = layout.boxes(param, 2)
        sizes = [tuple(x.stop - x.start for x in box.index(param)) for box in (first, *others)]
        assert set(sizes) == {sizes[0]}, param.row.jax
        assert 2 * math.prod(sizes[0]) <= layout.BOX_BYTES
        assert sum(map(math.prod, sizes)) == math.prod(param.shape)
        if 2 * math.prod(param.shape) > layout.BOX_BYTES:
            assert 2 * math.prod(sizes[0]) > layout.BOX_BYTES / 4


@pytest.mark.parametrize("limit", [1, 60, 300, 4096, 2**30])
def test_boxes_are_rows_of_the_tensors_in_order(monkeypatch, limit):
    monkeypatch.setattr(layout, "BOX_BYTES", limit)
    cfg = small_models.config(heads=6, kv_heads=2)
    for param in layout.params(videonsa.FAMILY, cfg):
        tensor = np.arange(math.prod(param.torch_shape)).reshape(param.torch_shape)
        layers = [tensor + layer * tensor.size for layer in range(param.row.layers or 1)]
        want = [param.row.op.to_jax(x) for x in layers]
        want = want[0] if param.row.layers is None else np.stack(want)
        got, seen = np.zeros_like(want), []
        for box in layout.boxes(param, 4):
            parts = [x[param.rows(box.units)] for x in layers[box.layers]]
            seen.append(np.concatenate(parts, axis=None))
            parts = [param.row.op.to_jax(x) for x in parts]
            got[box.index(param)] = parts[0] if param.row.layers is None else np.stack(parts)
        np.testing.assert_array_equal(got, want, err_msg=param.row.jax)
        assert list(itertools.chain(*seen)) == list(range(want.size)), param.row.jax
