"""What one conversation is between decoding and packing."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Visual:
    """One image or video, resized, normalised and cut into patches."""

    patches: np.ndarray  # f32[p e], ordered (frame, row, column, row in token, column in token)
    grid: tuple[int, int, int]  # patches along (time, height, width)
    is_video: bool
    seconds_per_grid: float = 1.0  # seconds between two temporal patches; images ignore it
    frame_seconds: tuple[float, ...] = ()  # when each sampled frame is shown; empty: not known


@dataclasses.dataclass(frozen=True)
class Sample:
    """Token ids in sequence order, with each image or video expanded to its placeholders."""

    tokens: np.ndarray  # i32[s]
    loss_weights: np.ndarray  # f32[s] weight of predicting this token; 0 outside the answers
    visuals: tuple[Visual, ...]  # in the order of their placeholders
