"""Frames -> patches, as Qwen2.5-VL's image processor does it (PIL variant)."""

import dataclasses
import math

import numpy as np
from PIL import Image

from videonsa_jax.config.schema import VisionConfig
from videonsa_jax.data.sample import Visual
from videonsa_jax.data.sampling import Frames, frames_from_arrays

MAX_ASPECT_RATIO = 200
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size to resize to: both sides multiples of `factor`, area in range, aspect about kept.

    Args:
      height: pixels.
      width: pixels.
      factor: pixels of one merged token's side, 28 for Qwen.
      min_pixels: the least height x width; smaller images are enlarged.
      max_pixels: the most, but no side falls below `factor`.

    Returns:
      (height, width).

    Raises:
      ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"{width}x{height} has an aspect ratio above {MAX_ASPECT_RATIO}, the most allowed"
        )
    rounded = [round(side / factor) * factor for side in (height, width)]
    area = rounded[0] * rounded[1]
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rounded = [
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        ]
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rounded = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return rounded[0], rounded[1]


def video_max_pixels(
    frames: int, *, min_pixels: int, max_pixels: int, total_pixels: int | None
) -> int:
    """The most pixels of a frame: `max_pixels`, less where `total_pixels` is shared by many frames.

    `total_pixels` bounds the sum over the video's temporal patches of two frames; a frame always
    keeps 1.05 x `min_pixels`.
    """
    if total_pixels is None:
        return max_pixels
    return min(max_pixels, max(int(total_pixels / frames * 2), int(min_pixels * 1.05)))


def frame_size(
    frames: int,
    height: int,
    width: int,
    cfg: VisionConfig,
    *,
    min_pixels: int,
    max_pixels: int,
    total_pixels: int | None = None,
) -> tuple[int, int]:
    """(height, width) to resize the frames of a video to."""
    most = video_max_pixels(
        frames, min_pixels=min_pixels, max_pixels=max_pixels, total_pixels=total_pixels
    )
    factor = cfg.patch_size * cfg.merge_size
    return smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=most)


def grid_of(frames: int, height: int, width: int, cfg: VisionConfig) -> tuple[int, int, int]:
    """Patches along (time, height, width) of resized frames."""
    return (
        -(-frames // cfg.temporal_patch_size),
        height // cfg.patch_size,
        width // cfg.patch_size,
    )


def merged_tokens(grid: tuple[int, int, int], cfg: VisionConfig) -> int:
    """Tokens that the language model sees of one image or video."""
    return math.prod(grid) // cfg.merge_size**2


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """u8[h w 3] -> u8[*size 3], bicubic."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def resize_to_limits(
    image: np.ndarray, frames: int, cfg: VisionConfig, **limits: int | None
) -> np.ndarray:
    """u8[h w 3] -> the size that `frame_size` gives each of `frames` frames within `limits`."""
    return resize(image, frame_size(frames, *image.shape[:2], cfg, **limits))


def patchify(images: np.ndarray, cfg: VisionConfig) -> np.ndarray:
    """Normalises frames and cuts them into flat patches.

    Args:
      images: u8[f h w 3], sides multiples of a merged token's; the last frame is repeated to fill
        the temporal patch.
      cfg: patch geometry.

    Returns:
      f32[p e]: patches ordered (time, row, column, row in token, column in token), values ordered
      (channel, frame, row, column).
    """
    missing = -len(images) % cfg.temporal_patch_size
    images = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
    t, h, w = grid_of(len(images), images.shape[1], images.shape[2], cfg)
    m, size = cfg.merge_size, cfg.patch_size
    cut = images.reshape(
        t, cfg.temporal_patch_size, h // m, m, size, w // m, m, size, cfg.in_channels
    )
    # time row column | row and column in token | channel, frame, row and column in patch
    cut = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, cfg.in_channels, -1)
    std = np.array(CLIP_STD, np.float64)[:, None]
    mean = np.array(CLIP_MEAN, np.float64)[:, None]
    patches = cut * (1 / (255 * std)).astype(np.float32)
    patches -= (mean / std).astype(np.float32)
    return patches.reshape(t * h * w, cfg.patch_elements)


def visual_from_frames(
    frames: Frames,
    cfg: VisionConfig,
    *,
    min_pixels: int,
    max_pixels: int,
    total_pixels: int | None = None,
) -> Visual:
    """A sampled video, resized by `frame_size`'s rule and cut into patches."""
    count, height, width = frames.images.shape[:3]
    size = frame_size(
        count,
        height,
        width,
        cfg,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        total_pixels=total_pixels,
    )
    images = np.stack([resize(image, size) for image in frames.images])
    return visual_from_resized(dataclasses.replace(frames, images=images), cfg)


def visual_from_resized(frames: Frames, cfg: VisionConfig, *, is_video: bool = True) -> Visual:
    """A video, or one picture, whose frames have the size that `frame_size` gives."""
    visual = Visual(
        patches=patchify(frames.images, cfg),
        grid=grid_of(*frames.images.shape[:3], cfg),
        is_video=is_video,
    )
    if not is_video:
        return visual
    return dataclasses.replace(
        visual,
        seconds_per_grid=cfg.temporal_patch_size / frames.sampled_fps,
        frame_seconds=tuple(frames.seconds.tolist()),
    )


def visual_from_image(
    image: np.ndarray, cfg: VisionConfig, *, min_pixels: int, max_pixels: int
) -> Visual:
    """One picture, u8[h w 3], resized and cut into patches; it fills the temporal patch alone."""
    size = frame_size(1, *image.shape[:2], cfg, min_pixels=min_pixels, max_pixels=max_pixels)
    frames = frames_from_arrays([resize(image, size)], fps=1.0)
    return visual_from_resized(frames, cfg, is_video=False)
