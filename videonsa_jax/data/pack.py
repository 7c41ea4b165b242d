"""Samples -> fixed-shape arrays in modality-major order (see `videonsa_jax.batch`)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from videonsa_jax.config.schema import ModelConfig
from videonsa_jax.data import positions
from videonsa_jax.data.sample import Sample

PAD_START = 2**30  # `start` of a padding token: beyond every order, so it sees nothing


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Slots of one row; a run compiles one program per bucket."""

    vision_tokens: int
    text_tokens: int


def frame_patches(grids: Sequence[tuple[int, int, int]], cfg: ModelConfig) -> int:
    """The static bound on patches per frame for these grids: a power of two, at least a window."""
    most = max((h * w for _, h, w in grids), default=1)
    return 1 << (max(most, cfg.vision.window_patches) - 1).bit_length()


def row_tokens(samples: Sequence[Sample], cfg: ModelConfig) -> tuple[int, int]:
    """(vision, text) slots that a row of these samples takes, block alignment included."""
    vision = text = 0
    for sample in samples:
        is_vision = positions.is_vision_token(sample.tokens, cfg)
        vision = _align(vision, cfg.nsa.block_size) + int(is_vision.sum())
        text += int((~is_vision).sum())
    return vision, text


def pack(
    rows: Sequence[Sequence[Sample]], bucket: Bucket, cfg: ModelConfig
) -> dict[str, np.ndarray]:
    """Lays samples out as one batch.

    Args:
      rows: the samples of each row, packed one after the other.
      bucket: slots per row.
      cfg: token ids, patch geometry and the NSA block that sequences are aligned to.

    Returns:
      The array fields of `videonsa_jax.batch.Batch`, by name.

    Raises:
      ValueError: a row does not fit the bucket, or a sample's placeholders and visuals disagree.
    """
    packed = [_pack_row(row, bucket, cfg) for row in rows]
    return {name: np.stack([row[name] for row in packed]) for name in packed[0]}


def _empty_row(bucket: Bucket, cfg: ModelConfig) -> dict[str, np.ndarray]:
    s, r = bucket.text_tokens, bucket.vision_tokens
    p = r * cfg.vision.merge_size**2
    return {
        "text_tokens": np.zeros(s, np.int32),
        "text_targets": np.zeros(s, np.int32),
        "text_weights": np.zeros(s, np.float32),
        "text_positions": np.zeros((s, 3), np.int32),
        "text_order": np.full(s, -1, np.int32),
        "text_start": np.full(s, PAD_START, np.int32),
        "vision_positions": np.zeros((r, 3), np.int32),
        "vision_order": np.full(r, -1, np.int32),
        "vision_start": np.full(r, PAD_START, np.int32),
        "vision_segment": np.full(r, -1, np.int32),
        "vision_slot": np.arange(r, dtype=np.int32),
        "patches": np.zeros((p, cfg.vision.patch_elements), np.float32),
        "patch_positions": np.zeros((p, 2), np.int32),
        "patch_window": np.zeros((p, 2), np.int32),
        "patch_frame": np.zeros((p, 2), np.int32),
    }


def _pack_row(samples: Sequence[Sample], bucket: Bucket, cfg: ModelConfig) -> dict[str, np.ndarray]:
    needed = row_tokens(samples, cfg)
    if needed[0] > bucket.vision_tokens or needed[1] > bucket.text_tokens:
        raise ValueError(
            f"the row needs {needed[0]} vision and {needed[1]} text slots; the bucket has "
            f"{bucket.vision_tokens} and {bucket.text_tokens}: use a larger bucket or fewer frames"
        )
    row = _empty_row(bucket, cfg)
    order = vision_at = text_at = 0
    for segment, sample in enumerate(samples):
        is_vision = positions.is_vision_token(sample.tokens, cfg)
        ids = positions.mrope_positions(sample.tokens, sample.visuals, cfg)
        vision_at = _align(vision_at, cfg.nsa.block_size)
        text = slice(text_at, text_at + int((~is_vision).sum()))
        vision = slice(vision_at, vision_at + int(is_vision.sum()))
        for name, slots, chosen in (("text", text, ~is_vision), ("vision", vision, is_vision)):
            row[f"{name}_positions"][slots] = ids[chosen]
            row[f"{name}_order"][slots] = order + np.flatnonzero(chosen)
            row[f"{name}_start"][slots] = order
        row["vision_segment"][vision] = segment
        row["text_tokens"][text] = sample.tokens[~is_vision]
        targets, weights = _targets(sample, is_vision)
        row["text_targets"][text] = targets[~is_vision]
        row["text_weights"][text] = weights[~is_vision]
        _place_patches(row, sample, vision_at, cfg)
        order, vision_at, text_at = order + len(sample.tokens), vision.stop, text.stop
    return row


def _targets(sample: Sample, is_vision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The next token of each token and its weight; the last token predicts nothing."""
    weights = np.append(sample.loss_weights[1:], 0).astype(np.float32)
    if (weights[is_vision] > 0).any() or (sample.loss_weights[is_vision] > 0).any():
        raise ValueError("loss weights on or right after an image or video: answers are text only")
    targets = np.append(sample.tokens[1:], 0)
    return np.where(weights > 0, targets, 0).astype(np.int32), weights


def _place_patches(row: dict, sample: Sample, at: int, cfg: ModelConfig) -> None:
    unit = cfg.vision.merge_size**2
    for visual in sample.visuals:
        layout = positions.patch_layout(visual.grid, cfg.vision)
        count = len(layout.order)
        merged = visual.patches.reshape(count, unit, -1)[layout.order]
        slots, patches = slice(at, at + count), slice(at * unit, (at + count) * unit)
        row["patches"][patches] = merged.reshape(count * unit, -1)
        row["patch_positions"][patches] = layout.coordinates
        row["patch_window"][patches] = at * unit + layout.windows
        row["patch_frame"][patches] = at * unit + layout.frames
        row["vision_slot"][slots][layout.order] = at + np.arange(count)
        at += count


def _align(n: int, block: int) -> int:
    return -(-n // block) * block
