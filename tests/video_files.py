"""Videos of every kind that PyAV here can write, and what decoding all of one gives."""

import pathlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import pytest

from videonsa_jax.data import video
from videonsa_jax.data.sampling import SamplingRule, frame_indices
from videonsa_jax.data.visuals import VideoFile

SIZE = (64, 48)  # width, height
RATE = 25


class Truth(NamedTuple):
    """What a plain sequential decode gives."""

    images: list[np.ndarray]
    seconds: np.ndarray  # from the first frame


def picture(i: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """u8[h w 3]: a frame unlike those next to it."""
    y, x = np.mgrid[: size[1], : size[0]]
    grey = (x * 2 + y + 9 * i) % 200 + 20
    image = np.stack([grey, np.roll(grey, i, axis=1), 255 - grey], axis=-1).astype(np.uint8)
    image[(i * 5) % size[1] :][:4] = 255
    return image


def encode(
    path: pathlib.Path,
    codec: str = "libx264",
    *,
    frames: int = 50,
    rate: Fraction | int = RATE,
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = SIZE,
    times: Sequence[float] | None = None,
    b_frames: int = 0,
    interlaced: bool = False,
    options: dict | None = None,
    muxing: dict | None = None,
) -> pathlib.Path:
    """Writes `frames` pictures, shown at `times` (seconds) if given; skips where PyAV cannot."""
    try:
        with av.open(str(path), "w", options=muxing or {}) as container:
            stream = container.add_stream(codec, rate=rate, options=options or {})
            stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
            context = stream.codec_context
            context.gop_size, context.max_b_frames = 12, b_frames
            if interlaced:
                context.flags |= av.codec.context.Flags.interlaced_dct
            if times is not None:
                context.time_base = Fraction(1, 1000)
            for i in range(frames):
                frame = av.VideoFrame.from_ndarray(picture(i, size), format="rgb24")
                if times is not None:
                    frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except (av.error.FFmpegError, ValueError) as error:
        kind = f"{codec} ({pix_fmt}) in {path.suffix}"
        pytest.skip(f"PyAV {av.__version__} does not write {kind}: {error}")
    return path


def remux(
    source: pathlib.Path,
    target: pathlib.Path,
    *,
    shift: float = 0.0,
    keep: Callable[[int], bool] = lambda i: True,
    rotation: int = 0,
    muxing: dict | None = None,
) -> pathlib.Path:
    """Copies packets, those that `keep` by number, shown `shift` seconds later."""
    with (
        av.open(str(source)) as old,
        av.open(str(target), "w", options=muxing or {}) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        if rotation:
            stream.set_display_rotation(rotation)
        ticks = round(shift / old.streams.video[0].time_base)
        for i, packet in enumerate(p for p in old.demux(video=0) if p.size):
            if keep(i):
                packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
                packet.stream = stream
                new.mux(packet)
    return target


def decode(path: pathlib.Path, stream: int = 0) -> Truth:
    """All whole frames of a file's `stream`-th video stream, in the order in which they come."""
    images, pts = [], []
    with av.open(str(path)) as container:
        chosen = container.streams.video[stream]
        chosen.codec_context.thread_count = 1  # damaged frames too decode alike each time
        for frame in _frames(container, chosen):
            if not frame.is_corrupt:
                turns = round(frame.rotation / 90) % 4
                images.append(np.rot90(frame.to_ndarray(format="rgb24"), turns))
                pts.append(frame.pts)
        if None in pts or (np.diff(pts) < 0).any():
            return Truth(images, np.arange(len(images)) / float(chosen.average_rate))
        return Truth(images, (np.array(pts) - pts[0]) * float(chosen.time_base))


def _frames(container, stream) -> Iterator[av.VideoFrame]:
    started = False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            if started:
                raise
            continue  # in front of the first keyframe
        started = started or bool(frames)
        yield from frames


def check(path: pathlib.Path, truth: Truth, rates: Sequence[float] = (4, 1000)) -> None:
    """Sampled frames and times are those of the truth, and measuring and reading agree."""
    rules = [SamplingRule(fps, 4, 768) for fps in rates]
    for rule in [*rules, SamplingRule(1, 4, 4)]:
        frames = video.sample_frames(
            path, fps=rule.fps, min_frames=rule.min_frames, max_frames=rule.max_frames
        )
        indices = frame_indices(len(truth.images), len(frames.images))
        np.testing.assert_array_equal(frames.indices, indices)
        np.testing.assert_array_equal(frames.images, [truth.images[i] for i in indices])
        np.testing.assert_allclose(frames.seconds, truth.seconds[indices], atol=1e-5)
        assert VideoFile(str(path)).outline(rule)[:3] == frames.images.shape[:3]
