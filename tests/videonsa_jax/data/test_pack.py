"""Packing moves tokens and patches without losing, mixing or renumbering any."""

import dataclasses

import numpy as np
import pytest

from tests import small_models
from tests.small_models import END, IMAGE, START, VIDEO, Vision
from videonsa_jax.data import hf_inputs, pack, positions

CFG = small_models.config()
BLOCK = CFG.nsa.block_size
PROMPTS = [[3, Vision((2, 6, 10), seconds=1.5), 4, Vision((1, 4, 4), is_video=False), 5], [6]]


@pytest.fixture(scope="module")
def samples():
    arrays = small_models.inputs(PROMPTS, CFG, padding="right", seed=1)
    return small_models.samples(arrays, CFG)


def _row(samples, spare=5):
    vision, text = pack.row_tokens(samples, CFG)
    fields = pack.pack([samples], pack.Bucket(vision + spare, text + spare), CFG)
    return {name: value[0] for name, value in fields.items()}


def test_sequence_order_can_be_restored(samples):
    row = _row(samples)
    whole = np.concatenate([sample.tokens for sample in samples])
    ids = np.concatenate([positions.mrope_positions(s.tokens, s.visuals, CFG) for s in samples])
    starts = np.repeat([0, len(samples[0].tokens)], [len(s.tokens) for s in samples])
    for stream in ("vision", "text"):
        order = row[f"{stream}_order"]
        real = order >= 0
        np.testing.assert_array_equal(row[f"{stream}_positions"][real], ids[order[real]])
        np.testing.assert_array_equal(row[f"{stream}_start"][real], starts[order[real]])
        assert (row[f"{stream}_start"][~real] == pack.PAD_START).all()
    text_order = row["text_order"]
    np.testing.assert_array_equal(
        row["text_tokens"][text_order >= 0], whole[text_order[text_order >= 0]]
    )
    seen = np.sort(np.concatenate([row["vision_order"], text_order]))
    np.testing.assert_array_equal(seen[seen >= 0], np.arange(len(whole)))


def test_targets_are_the_next_tokens_of_the_answer(samples):
    row = _row(samples)
    whole = np.concatenate([sample.tokens for sample in samples])
    weights = np.concatenate([sample.loss_weights for sample in samples])
    for target, weight, order in zip(
        row["text_targets"], row["text_weights"], row["text_order"], strict=True
    ):
        if weight:
            assert (target, weight) == (whole[order + 1], weights[order + 1])
        else:
            assert target == 0
    assert row["text_weights"].sum() == weights.sum()


def test_patches_follow_their_tokens(samples):
    """A patch marked with its token's index in the sequence is found again through the slots."""
    sample, unit = samples[0], CFG.vision.merge_size**2
    places = np.flatnonzero(np.isin(sample.tokens, [IMAGE, VIDEO]))
    marked, at = [], 0
    for visual in sample.visuals:
        count = len(visual.patches) // unit
        marks = np.repeat(places[at : at + count], unit)[:, None]
        patches = np.broadcast_to(marks, visual.patches.shape).astype(np.float32)
        marked.append(dataclasses.replace(visual, patches=patches))
        at += count
    row = _row([dataclasses.replace(sample, visuals=tuple(marked))])
    real = row["vision_order"] >= 0
    tokens = row["patches"].reshape(-1, unit, CFG.vision.patch_elements)[row["vision_slot"]]
    want = np.broadcast_to(row["vision_order"][real][:, None, None], tokens[real].shape)
    np.testing.assert_array_equal(tokens[real], want)


def test_windows_and_frames_stay_inside_their_visual(samples):
    row = _row(samples)
    used = row["patch_frame"][:, 1] > 0
    index = np.arange(len(used))
    for name, most in (("patch_window", CFG.vision.window_patches), ("patch_frame", 60)):
        ranges = row[name]
        assert (ranges[~used] == 0).all()
        assert ((ranges[used, 0] <= index[used]) & (index[used] < ranges[used, 1])).all()
        assert (ranges[:, 1] - ranges[:, 0]).max() <= most


def test_sequences_start_at_a_block():
    arrays = small_models.inputs(
        [[1, Vision((1, 2, 6))], [1, Vision((1, 4, 4))]], CFG, padding="left", seed=1
    )
    row = _row(hf_inputs.to_samples(arrays, CFG)[0])
    segments = row["vision_segment"]
    assert [int(np.argmax(segments == n)) % BLOCK for n in (0, 1)] == [0, 0]
    np.testing.assert_array_equal(segments[:8], [0, 0, 0, -1, 1, 1, 1, 1])


def test_a_row_beyond_the_bucket_is_named(samples):
    vision, text = pack.row_tokens(samples, CFG)
    with pytest.raises(ValueError, match=f"needs {vision} vision and {text} text slots"):
        pack.pack([samples], pack.Bucket(vision, text - 1), CFG)


def test_an_answer_that_contains_vision_is_rejected(samples):
    weights = (samples[0].tokens == START).astype(np.float32)
    weights = np.roll(weights, 1)  # on the first placeholder
    with pytest.raises(ValueError, match="answers are text only"):
        _row([dataclasses.replace(samples[0], loss_weights=weights)])


def test_a_weight_right_after_vision_is_rejected(samples):
    weights = (samples[0].tokens == END).astype(np.float32)  # predicted by the last placeholder
    with pytest.raises(ValueError, match="answers are text only"):
        _row([dataclasses.replace(samples[0], loss_weights=weights)])
