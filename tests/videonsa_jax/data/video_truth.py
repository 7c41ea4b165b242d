"""Videos of every kind that PyAV here can write, and what decoding all of one gives."""

import pathlib
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import pytest

from videonsa_jax.data import video
from videonsa_jax.data.sampling import SamplingRule, frame_indices
from videonsa_jax.data.visuals import VideoFile

WIDTH, HEIGHT = 64, 48


class Truth(NamedTuple):
    """A plain sequential decode."""

    images: list[np.ndarray]
    seconds: np.ndarray  # from the first frame


def picture(i: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """u8[h w 3]: a frame unlike those next to it."""
    y, x = np.mgrid[:height, :width]
    grey = (x * 2 + y + 9 * i) % 200 + 20
    image = np.stack([grey, np.roll(grey, i, axis=1), 255 - grey], axis=-1).astype(np.uint8)
    image[(i * 5) % height : (i * 5) % height + 4] = 255
    return image


def encode(
    path: pathlib.Path,
    codec: str = "libx264",
    *,
    frames: int = 50,
    rate: Fraction | int = 25,
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (WIDTH, HEIGHT),
    times: Sequence[float] | None = None,
    keyframe_every: int = 12,
    b_frames: int = 0,
    options: dict | None = None,
    container_options: dict | None = None,
    container_format: str | None = None,
    interlaced: bool = False,
) -> pathlib.Path:
    """Writes `frames` pictures; `times` (seconds) makes the rate variable. Skips what cannot be."""
    try:
        with av.open(
            str(path), "w", format=container_format, options=container_options or {}
        ) as container:
            stream = container.add_stream(codec, rate=rate, options=options or {})
            stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
            context = stream.codec_context
            context.gop_size, context.max_b_frames, context.thread_count = (
                keyframe_every,
                b_frames,
                1,
            )
            if interlaced:
                context.flags |= av.codec.context.Flags.interlaced_dct
            if times is not None:
                context.time_base = Fraction(1, 1000)
            for i in range(frames):
                frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
                if times is not None:
                    frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except (av.error.FFmpegError, ValueError) as error:
        pytest.skip(f"PyAV {av.__version__} does not write {codec} ({pix_fmt}) to {path.suffix}: {error}")
    return path


def decoded(path: pathlib.Path, stream: int = 0) -> Truth:
    """All whole frames of the `stream`-th video stream, in the order in which they come."""
    images, pts = [], []
    with av.open(str(path)) as container:
        chosen = container.streams.video[stream]
        for frame in container.decode(chosen):
            if not frame.is_corrupt:
                turns = round(frame.rotation / 90) % 4
                images.append(np.rot90(frame.to_ndarray(format="rgb24"), turns))
                pts.append(frame.pts)
        tick, rate = chosen.time_base, chosen.average_rate
    if None in pts or (np.diff(pts) < 0).any():
        return Truth(images, np.arange(len(images)) / float(rate))
    return Truth(images, (np.array(pts) - pts[0]) * float(tick))


def check(path: pathlib.Path, truth: Truth, rates: Sequence[float] = (4, 1000)) -> None:
    """Sampled frames are those of the truth, and measuring and reading agree."""
    total = len(truth.images)
    for rule in [SamplingRule(fps, 4, 768) for fps in rates] + [SamplingRule(1, 4, 4)]:
        frames = video.sample_frames(
            path, fps=rule.fps, min_frames=rule.min_frames, max_frames=rule.max_frames
        )
        np.testing.assert_array_equal(frames.indices, frame_indices(total, len(frames.images)))
        np.testing.assert_array_equal(frames.images, [truth.images[i] for i in frames.indices])
        np.testing.assert_allclose(frames.seconds, truth.seconds[frames.indices], atol=1e-5)
        outline = VideoFile(str(path)).outline(rule)
        assert outline[:3] == frames.images.shape[:3]
