"""Sizes, pixels and patch order are those of Qwen2VLImageProcessor."""

import math

import numpy as np
import pytest

from videonsa_jax.config.schema import PRESETS
from videonsa_jax.data import processor
from videonsa_jax.data.sampling import Frames

CFG = PRESETS["qwen2_5_vl_7b"].vision
LIMITS = {"min_pixels": 56 * 56, "max_pixels": 64 * 28 * 28}
SIZES = [(37, 91), (480, 641), (333, 1001), (20, 3000), (29, 29), (57, 55), (2, 3)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "low", "high", "size"),
    [
        (480, 640, 3136, 50176, (168, 252)),  # shrunk: floors to multiples of 28
        (56, 84, 3136, 50176, (56, 84)),  # untouched
        (60, 70, 3136, 50176, (56, 56)),  # rounded, halves to even
        (20, 20, 3136, 50176, (56, 56)),  # enlarged: ceils
        (720, 1280, 50176, 50176, (168, 280)),
    ],
)
def test_smart_resize(height, width, low, high, size):
    got = processor.smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
    assert got == size


def test_extreme_aspect_ratio_is_rejected():
    with pytest.raises(ValueError, match="2010x10 has an aspect ratio above 200"):
        processor.smart_resize(10, 2010, factor=28, min_pixels=3136, max_pixels=50176)


def test_total_pixels_are_shared_by_the_frames():
    def most(frames, total):
        return processor.video_max_pixels(
            frames, min_pixels=10_000, max_pixels=50_000, total_pixels=total
        )

    assert most(100, None) == 50_000
    assert most(100, 10_000_000) == 50_000
    assert most(100, 1_000_000) == 20_000  # of each frame pair
    assert most(1000, 1_000_000) == 10_500  # never below 1.05 x min_pixels


@pytest.mark.torch
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pictures_equal_transformers(height, width):
    pil = pytest.importorskip(
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
        reason="transformers with the PIL image processor is not installed",
    )
    image = picture(height, width)
    theirs = pil.Qwen2VLImageProcessorPil(**LIMITS)(
        images=[image], return_tensors="np", input_data_format="channels_last"
    )
    ours = processor.visual_from_image(image, CFG, **LIMITS)
    assert ours.grid == tuple(theirs["image_grid_thw"][0])
    np.testing.assert_allclose(ours.patches, theirs["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.torch
def test_still_video_equals_transformers_picture_by_picture():
    """Two equal frames are what the image processor makes of one picture."""
    pil = pytest.importorskip(
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
        reason="transformers with the PIL image processor is not installed",
    )
    images = [picture(50, 90, seed) for seed in range(3)]
    theirs = pil.Qwen2VLImageProcessorPil(**LIMITS)(images=images, return_tensors="np")
    frames = np.repeat(np.stack(images), 2, axis=0)
    seconds, indices = np.arange(6, dtype=np.float32), np.arange(6, dtype=np.int32)
    ours = processor.visual_from_frames(Frames(frames, seconds, indices, 4.0), CFG, **LIMITS)
    assert ours.grid == (3, *theirs["image_grid_thw"][0][1:])
    assert ours.is_video
    assert ours.seconds_per_grid == 0.5  # two frames at 4 per second
    np.testing.assert_allclose(ours.patches, theirs["pixel_values"], rtol=0, atol=1e-6)


def test_every_value_of_a_patch_is_where_it_belongs():
    """Patch (time, row, column, row in token, column in token), value (channel, frame, y, x)."""
    frames = np.random.default_rng(1).integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    patches = processor.patchify(frames, CFG)
    grid = (2, 2, 2, 14, 3, 2, 14)  # time, row of tokens, row in token, y; column likewise
    for t, row, i, y, column, j, x in np.random.default_rng(2).integers(0, grid, (50, 7)):
        patch = (((t * 2 + row) * 3 + column) * 2 + i) * 2 + j
        for channel in range(3):
            for frame in range(2):
                value = ((channel * 2 + frame) * 14 + y) * 14 + x
                pixel = frames[t * 2 + frame, (row * 2 + i) * 14 + y, (column * 2 + j) * 14 + x]
                want = pixel[channel] / 255 - processor.CLIP_MEAN[channel]
                want /= processor.CLIP_STD[channel]
                assert patches[patch, value] == pytest.approx(want, abs=1e-6)


def test_odd_number_of_frames_repeats_the_last():
    frames = np.stack([picture(28, 28, seed) for seed in range(3)])
    even = np.concatenate([frames, frames[-1:]])
    np.testing.assert_array_equal(processor.patchify(frames, CFG), processor.patchify(even, CFG))
    assert processor.grid_of(3, 28, 28, CFG) == (2, 2, 2)


def test_tokens_of_the_papers_frame_size():
    """50,176 pixels are 64 tokens a frame pair for square videos and 60 for 16:9."""
    for (height, width), tokens in {(500, 500): 64, (720, 1280): 60, (480, 640): 54}.items():
        size = processor.frame_size(2, height, width, CFG, min_pixels=3136, max_pixels=50176)
        grid = processor.grid_of(2, *size, CFG)
        assert processor.merged_tokens(grid, CFG) == tokens
        assert math.prod(size) <= 50176
