"""Hugging Face's batch layout in, samples out, and text values back to its columns."""

import numpy as np
import pytest

from tests import small_models
from tests.small_models import IMAGE, VIDEO, Vision
from videonsa_jax.data import hf_inputs

CFG = small_models.config()
PROMPTS = [
    [2, Vision((2, 4, 2), seconds=1.5), 1, Vision((1, 2, 2), is_video=False)],
    [3],
    [1, Vision((1, 4, 6)), 2],
]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_rows_get_their_own_tokens_and_visuals(padding):
    arrays = small_models.inputs(PROMPTS, CFG, padding=padding, seed=0)
    samples, columns = hf_inputs.to_samples(arrays, CFG)
    assert [[v.grid for v in s.visuals] for s in samples] == [
        [(2, 4, 2), (1, 2, 2)],
        [],
        [(1, 4, 6)],
    ]
    assert [v.seconds_per_grid for s in samples for v in s.visuals if v.is_video] == [1.5, 1.0]
    np.testing.assert_array_equal(samples[2].visuals[0].patches, arrays["pixel_values_videos"][16:])
    for row, (sample, column) in enumerate(zip(samples, columns, strict=True)):
        mask = arrays["attention_mask"][row].astype(bool)
        np.testing.assert_array_equal(sample.tokens, arrays["input_ids"][row][mask])
        text = sample.tokens[~np.isin(sample.tokens, [IMAGE, VIDEO])]
        np.testing.assert_array_equal(arrays["input_ids"][row][column], text)


def test_text_values_return_to_their_columns():
    arrays = small_models.inputs(PROMPTS, CFG, padding="left", seed=0)
    length = arrays["input_ids"].shape[1]
    samples, columns = hf_inputs.to_samples(arrays, CFG)
    slots = max(len(c) for c in columns) + 2
    values = np.full((len(samples), slots, 1), -1.0)
    for row, column in enumerate(columns):
        values[row, : len(column), 0] = arrays["input_ids"][row, column]
    back = hf_inputs.to_columns(values, columns, length)[..., 0]
    text = arrays["attention_mask"].astype(bool) & ~np.isin(arrays["input_ids"], [IMAGE, VIDEO])
    np.testing.assert_array_equal(back, np.where(text, arrays["input_ids"], 0))


def test_without_a_mask_every_token_counts():
    samples, _ = hf_inputs.to_samples({"input_ids": np.array([[0, 5, 0]])}, CFG)
    np.testing.assert_array_equal(samples[0].tokens, [0, 5, 0])


def test_disagreeing_inputs_are_reported():
    arrays = small_models.inputs(PROMPTS, CFG, padding="left", seed=0)
    with pytest.raises(ValueError, match="needs 40 rows of pixel_values_videos"):
        hf_inputs.to_samples({**arrays, "pixel_values_videos": np.zeros((39, 96))}, CFG)
    without = {k: v for k, v in arrays.items() if k not in ("pixel_values", "image_grid_thw")}
    with pytest.raises(ValueError, match="has no image left"):
        hf_inputs.to_samples(without, CFG)
    with pytest.raises(ValueError, match="1 videos and 0 images are left"):
        hf_inputs.to_samples(
            {k: v[:2] if k in ("input_ids", "attention_mask") else v for k, v in arrays.items()},
            CFG,
        )
