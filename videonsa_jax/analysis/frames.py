"""The pictures that the model saw, recovered from its patches."""

import dataclasses

import numpy as np

from videonsa_jax.config.schema import VisionConfig
from videonsa_jax.data import processor
from videonsa_jax.data.sample import Sample, Visual


@dataclasses.dataclass(frozen=True)
class Step:
    """One temporal patch: the frames that share their vision tokens."""

    image: np.ndarray  # u8[h w 3], the first of its frames
    seconds: float | None  # when it is shown
    tokens: int


def steps(sample: Sample, cfg: VisionConfig) -> list[Step]:
    """The temporal patches of all videos and images, in the order of their tokens."""
    return [step for visual in sample.visuals for step in _steps(visual, cfg)]


def _steps(visual: Visual, cfg: VisionConfig) -> list[Step]:
    t, h, w = visual.grid
    images = unpatchify(visual, cfg)[:: cfg.temporal_patch_size]
    seconds = visual.frame_seconds[:: cfg.temporal_patch_size] or (None,) * t
    tokens = h * w // cfg.merge_size**2
    return [Step(image, second, tokens) for image, second in zip(images, seconds, strict=True)]


def unpatchify(visual: Visual, cfg: VisionConfig) -> np.ndarray:
    """The inverse of `processor.patchify`: u8[f h w 3]."""
    t, h, w = visual.grid
    m, size = cfg.merge_size, cfg.patch_size
    values = visual.patches.reshape(-1, cfg.in_channels, cfg.patch_elements // cfg.in_channels)
    mean, std = (np.array(x)[:, None] for x in (processor.CLIP_MEAN, processor.CLIP_STD))
    pixels = np.rint((values * std + mean) * 255).clip(0, 255).astype(np.uint8)
    # time row column | row and column in token | channel, frame, row and column in patch
    cut = pixels.reshape(
        t, h // m, w // m, m, m, cfg.in_channels, cfg.temporal_patch_size, size, size
    )
    frames = cut.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return frames.reshape(t * cfg.temporal_patch_size, h * size, w * size, cfg.in_channels)
