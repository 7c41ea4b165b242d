"""Model inputs as Hugging Face lays them out -> `Sample`s, and text rows back to its layout."""

from collections.abc import Mapping, Sequence

import numpy as np

from videonsa_jax.config.schema import ModelConfig
from videonsa_jax.data import positions
from videonsa_jax.data.sample import Sample, Visual


def to_samples(
    inputs: Mapping[str, np.ndarray], cfg: ModelConfig
) -> tuple[list[Sample], list[np.ndarray]]:
    """Splits a batch of arrays named as Hugging Face's processor names them.

    Args:
      inputs: `input_ids` i[B T] and, where they apply, `attention_mask` i[B T] (0 is padding, on
        either side), `pixel_values_videos` f[p e] with `video_grid_thw` i[videos 3] and
        `second_per_grid_ts` f[videos] (1 s if absent), `pixel_values` f[p e] with `image_grid_thw`
        i[images 3]; images and videos of all rows in order. Other arrays are ignored.
      cfg: token ids and merge size.

    Returns:
      One sample per row, padding dropped, and per row i32[text tokens]: the column of `input_ids`
      that each of its text tokens came from.

    Raises:
      ValueError: grids, pixels and placeholders disagree.
    """
    tokens = np.asarray(inputs["input_ids"])
    mask = np.asarray(inputs["attention_mask"]) if "attention_mask" in inputs else tokens >= 0
    videos = _visuals(inputs, "pixel_values_videos", "video_grid_thw", is_video=True)
    images = _visuals(inputs, "pixel_values", "image_grid_thw", is_video=False)
    samples, columns = [], []
    for row, row_mask in zip(tokens, mask, strict=True):
        kept = np.flatnonzero(row_mask)
        ids = row[kept].astype(np.int32)
        visuals = _take_visuals(ids, videos, images, cfg)
        samples.append(Sample(ids, np.zeros(len(ids), np.float32), visuals))
        columns.append(kept[~positions.is_vision_token(ids, cfg)].astype(np.int32))
    if videos or images:
        raise ValueError(
            f"{len(videos)} videos and {len(images)} images are left after the last row's "
            "placeholders"
        )
    return samples, columns


def to_columns(text: np.ndarray, columns: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Values of text tokens f[B s v] -> f[B length v] in sequence order, 0 at all other places."""
    out = np.zeros((len(columns), length, *text.shape[2:]), text.dtype)
    for row, (values, places) in enumerate(zip(text, columns, strict=True)):
        out[row, places] = values[: len(places)]
    return out


def _visuals(
    inputs: Mapping[str, np.ndarray], pixels: str, grids: str, *, is_video: bool
) -> list[Visual]:
    """All images or all videos of the batch, in order."""
    if grids not in inputs:
        return []
    sizes = [tuple(int(n) for n in grid) for grid in inputs[grids]]
    counts = [t * h * w for t, h, w in sizes]
    patches = np.asarray(inputs[pixels], np.float32)
    if sum(counts) != len(patches):
        raise ValueError(
            f"{grids} {sizes} needs {sum(counts)} rows of {pixels}, not {patches.shape}"
        )
    seconds = [1.0] * len(sizes)
    if is_video and "second_per_grid_ts" in inputs:
        seconds = [float(value) for value in inputs["second_per_grid_ts"]]
    parts = np.split(patches, np.cumsum(counts)[:-1])
    return [
        Visual(part, grid, is_video, every)
        for part, grid, every in zip(parts, sizes, seconds, strict=True)
    ]


def _take_visuals(
    tokens: np.ndarray, videos: list[Visual], images: list[Visual], cfg: ModelConfig
) -> tuple[Visual, ...]:
    """Removes from the front of both lists what this row's placeholders stand for."""
    taken = []
    at = 0
    while (rest := np.flatnonzero(positions.is_vision_token(tokens[at:], cfg))).size:
        at += int(rest[0])
        kind, pool = ("video", videos) if tokens[at] == cfg.video_token_id else ("image", images)
        if not pool:
            raise ValueError(f"the placeholder at token {at} has no {kind} left in the inputs")
        visual = pool.pop(0)
        taken.append(visual)
        at += int(np.prod(positions.merged_grid(visual.grid, cfg.vision)))
    return tuple(taken)
