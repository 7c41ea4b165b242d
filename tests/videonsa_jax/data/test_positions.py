"""Rotary ids and window order of the published model."""

import dataclasses

import numpy as np
import pytest

from tests import small_models
from tests.small_models import IMAGE, VIDEO, Vision
from videonsa_jax.data import hf_inputs, positions

CFG = small_models.config()
GRIDS = [(1, 4, 4), (3, 6, 10), (2, 10, 6), (1, 2, 14), (4, 8, 8)]


def _sample(prompt, cfg=CFG):
    arrays = small_models.inputs([prompt], cfg, padding="right", seed=0)
    return hf_inputs.to_samples(arrays, cfg)[0][0]


def test_ids_of_a_short_prompt():
    sample = _sample(
        [1, Vision((2, 4, 2), seconds=1.5), 1]
    )  # start marker, 2 x (2 x 1), end marker
    got = positions.mrope_positions(sample.tokens, sample.visuals, CFG)
    video = [(2, 2, 2), (2, 3, 2), (5, 2, 2), (5, 3, 2)]
    np.testing.assert_array_equal(got, [(0,) * 3, (1,) * 3, *video, (6,) * 3, (7,) * 3])


def test_spatial_advance_ignores_time():
    cfg = dataclasses.replace(CFG, position_advance="spatial")
    sample = _sample([1, Vision((2, 4, 2), seconds=1.5), 1], cfg)
    got = positions.mrope_positions(sample.tokens, sample.visuals, cfg)
    np.testing.assert_array_equal(got[-2:], [(4,) * 3, (5,) * 3])


def test_image_ids_do_not_advance_in_time():
    sample = _sample([1, Vision((1, 4, 4), is_video=False)])
    got = positions.mrope_positions(sample.tokens, sample.visuals, CFG)
    np.testing.assert_array_equal(got[2:6], [(2, 2, 2), (2, 2, 3), (2, 3, 2), (2, 3, 3)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tokens: np.append(tokens, VIDEO), "1 placeholders are left"),
        (lambda tokens: tokens[tokens != VIDEO], "needs 4 placeholders"),
        (lambda tokens: np.where(tokens == VIDEO, IMAGE, tokens), "needs 4 placeholders 91"),
    ],
)
def test_wrong_placeholders_are_reported(change, message):
    sample = _sample([2, Vision((2, 4, 2)), 3])
    with pytest.raises(ValueError, match=message):
        positions.mrope_positions(change(sample.tokens), sample.visuals, CFG)


def test_layout_of_a_grid_with_edge_windows():
    layout = positions.patch_layout((1, 4, 6), CFG.vision)  # 2 x 3 tokens, windows of 2 x 2
    np.testing.assert_array_equal(layout.order, [0, 1, 3, 4, 2, 5])
    assert [tuple(r) for r in layout.windows[::4]] == [(0, 16)] * 4 + [(16, 24)] * 2
    assert {tuple(r) for r in layout.frames} == {(0, 24)}
    np.testing.assert_array_equal(
        layout.coordinates[4:8], [(0, 2), (0, 3), (1, 2), (1, 3)]
    )  # token 1


@pytest.mark.torch
def test_window_order_equals_transformers():
    pytest.importorskip("torch", reason="needs PyTorch (see the test extra)")
    vision_utils = pytest.importorskip("transformers.vision_utils", reason="needs transformers")
    import torch

    for grid in GRIDS:
        index, bounds = vision_utils.get_vision_window_index(
            torch.tensor([grid]),
            spatial_merge_size=CFG.vision.merge_size,
            window_size=CFG.vision.window_pixels,
            patch_size=CFG.vision.patch_size,
        )
        layout = positions.patch_layout(grid, CFG.vision)
        np.testing.assert_array_equal(layout.order, index)
        starts = np.unique(np.append(layout.windows, 0))
        np.testing.assert_array_equal(starts, np.unique(bounds))


@pytest.mark.torch
@pytest.mark.parametrize("seconds", [0.4, 1.0, 1.5])
def test_rotary_ids_equal_transformers(seconds):
    torch = pytest.importorskip("torch", reason="needs PyTorch (see the test extra)")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from tests import huggingface

    cfg = dataclasses.replace(CFG, position_advance="spatial")
    with torch.device("meta"):
        config = huggingface.torch_config(cfg)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    prompt = [2, *(Vision(grid, is_video=grid[0] > 1, seconds=seconds) for grid in GRIDS), 3]
    arrays = small_models.inputs([prompt, [5]], cfg, padding="left", seed=0)
    inputs = huggingface.torch_inputs(arrays)
    want = model.model.get_rope_index(**inputs)[0].numpy()
    for row, sample in enumerate(hf_inputs.to_samples(arrays, cfg)[0]):
        got = positions.mrope_positions(sample.tokens, sample.visuals, cfg)
        mask = arrays["attention_mask"][row].astype(bool)
        np.testing.assert_array_equal(got, want[:, row][:, mask].T)
