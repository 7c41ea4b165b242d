"""How many frames of a video are taken and which, by Qwen's published rules."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from videonsa_jax.data.errors import BadSample

FRAME_FACTOR = 2  # sampled frames are a multiple of this

# (u8[h w 3] frame, number of sampled frames) -> u8[h' w' 3]; applied frame by frame, so that a
# long video is never held at full size
Transform = Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Frames:
    """What was sampled from one video."""

    images: np.ndarray  # u8[f h w 3], RGB
    seconds: np.ndarray  # f32[f] when each frame is shown, from the video's first frame
    indices: np.ndarray  # i32[f] which frame of the video it is
    sampled_fps: float  # sampled frames per second of video


@dataclasses.dataclass(frozen=True)
class SamplingRule:
    """How many frames to take of a video."""

    fps: float  # per second of video
    min_frames: int
    max_frames: int

    def count(self, total: int, video_fps: float, path: str | pathlib.Path) -> int:
        """`frame_count` of a file's frames; raises BadSample where there are too few."""
        try:
            return frame_count(
                total,
                video_fps,
                fps=self.fps,
                min_frames=self.min_frames,
                max_frames=self.max_frames,
            )
        except ValueError as error:
            raise BadSample(str(path), str(error)) from error


def frame_count(
    total: int, video_fps: float, *, fps: float, min_frames: int, max_frames: int
) -> int:
    """How many frames to sample: `fps` of them per second, within bounds, an even number.

    Raises:
      ValueError: fewer than two frames can be sampled.
    """
    least = math.ceil(min_frames / FRAME_FACTOR) * FRAME_FACTOR
    most = math.floor(max_frames / FRAME_FACTOR) * FRAME_FACTOR
    wanted = min(max(total / video_fps * fps, least), most, total)
    count = math.floor(wanted / FRAME_FACTOR) * FRAME_FACTOR
    if count < FRAME_FACTOR:
        raise ValueError(
            f"{total} frames with max_frames={max_frames} leave {count} to sample; "
            f"at least {FRAME_FACTOR} are needed"
        )
    return count


def frame_indices(total: int, count: int) -> np.ndarray:
    """i32[count]: evenly spread over the video, first and last frame included.

    As torch.linspace computes it, so that ties round alike: a float32 step, counted from the nearer
    end, multiplied and added with a single rounding to float32.
    """
    last, step = np.float32(total - 1), np.float32(total - 1) / np.float32(max(count - 1, 1))
    i = np.arange(count, dtype=np.float64)
    spread = np.where(i < count // 2, step * i, last - step * (count - 1 - i))
    return np.round(spread.astype(np.float32)).astype(np.int32)


def frames_from_arrays(images: Sequence[np.ndarray], *, fps: float) -> Frames:
    """Frames u8[h w 3] that lie 1 / `fps` seconds apart."""
    indices = np.arange(len(images), dtype=np.int32)
    return Frames(np.stack(images), (indices / fps).astype(np.float32), indices, float(fps))
