"""Video files -> sampled frames (PyAV): the frames and times that decoding the whole file gives.

Which frames to take is chosen from a predicted timeline; each decoded frame must be the timeline's
next one. Where one is not, the whole file is decoded to find its timeline, and once more to sample.
"""

import bisect
import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from videonsa_jax.data import container as containers
from videonsa_jax.data import timeline as timelines
from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.sampling import Frames, SamplingRule, Transform, frame_indices
from videonsa_jax.data.timeline import Timeline

SEEK_OVER = 24  # decode this many frames rather than seek


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a video is, before it is sampled."""

    frames: int
    fps: float  # frames per second, on average where the rate varies
    height: int  # of the first frame as it is shown
    width: int


class _Mispredicted(Exception):
    """Other frames are decoded than the timeline says."""


def probe(path: str | pathlib.Path) -> VideoInfo:
    """Number, rate and size of a video's frames, decoding as few of them as can be trusted.

    Raises:
      BadSample: the file is missing, is not a video, is truncated, or does not decode.
    """
    timeline, size = timelines.predict_from_index(path) or timelines.predict(path), None
    if timeline is not None and timeline.is_reliable:
        size = timelines.opening_size(path)
    if timeline is None or size is None:
        timeline, size = timelines.scan(path)
    return VideoInfo(timeline.total, timeline.fps, *size)


def sample_frames(
    path: str | pathlib.Path,
    *,
    fps: float,
    min_frames: int,
    max_frames: int,
    transform: Transform | None = None,
) -> Frames:
    """Decodes evenly spread frames of a video file.

    Args:
      path: any container and codec that FFmpeg reads.
      fps: frames to sample per second of video.
      min_frames: the least frames, rounded up to even.
      max_frames: the most, rounded down to even.
      transform: applied to each frame as it is decoded, e.g. to make it smaller.

    Raises:
      BadSample: the file is missing, is not a video, is truncated, does not decode, has fewer than
        two frames, or frames of several sizes.
    """
    rule = SamplingRule(fps, min_frames, max_frames)
    timeline = timelines.predict(path)
    if timeline is not None:
        # a wrong prediction may also look like a damaged file; decoding all of it tells
        with contextlib.suppress(_Mispredicted, BadSample):
            return _sample(path, timeline, rule, transform)
    timeline, _ = timelines.scan(path)
    return _sample(path, timeline, rule, transform)


def _sample(
    path: str | pathlib.Path, timeline: Timeline, rule: SamplingRule, transform: Transform | None
) -> Frames:
    count = rule.count(timeline.total, timeline.fps, path)
    indices = frame_indices(timeline.total, count)
    images, size = [], None
    for frame in _walk(path, timeline, indices.tolist()):
        size = size or containers.shown_size(frame)
        if containers.shown_size(frame) != size:
            raise BadSample(str(path), "its frames change size")
        image = _upright(frame)
        images.append(image if transform is None else transform(image, count))
    return Frames(
        images=np.stack(images),
        seconds=timeline.seconds[indices].astype(np.float32),
        indices=indices,
        sampled_fps=timeline.sampled_fps(indices),
    )


def _walk(
    path: str | pathlib.Path, timeline: Timeline, wanted: Sequence[int]
) -> Iterator[av.VideoFrame]:
    """The frames `wanted`, in order, the video's last one among them; raises _Mispredicted."""
    with containers.opened(path) as (container, stream):
        frames, position = containers.whole_frames(containers.packets_of(container, stream)), 0
        for index in wanted:
            start = _keyframe_before(timeline, index)
            if timeline.is_reliable and start - position > SEEK_OVER:
                container.seek(timeline.pts[start], stream=stream)
                frames = _from_keyframe(container, stream, timeline.pts[start])
                position = start
            for expected in timeline.pts[position : index + 1]:
                frame = next(frames, None)
                if frame is None or frame.pts != expected:
                    raise _Mispredicted
            yield frame
            position = index + 1
        if next(frames, None) is not None:
            raise _Mispredicted


def _keyframe_before(timeline: Timeline, index: int) -> int:
    place = bisect.bisect_right(timeline.keyframes, index)
    return timeline.keyframes[place - 1] if place else 0


def _from_keyframe(
    container: InputContainer, stream: VideoStream, pts: int
) -> Iterator[av.VideoFrame]:
    """The frames from a keyframe on, after a seek to it; raises _Mispredicted where it missed."""
    frames = containers.whole_frames(containers.packets_of(container, stream))
    for frame in frames:
        # frames shown before the keyframe may need others that were not decoded
        if frame.pts is not None and frame.pts >= pts:
            if frame.pts > pts or not frame.key_frame:
                raise _Mispredicted
            yield frame
            yield from frames


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """u8[h w 3], turned as the file says it is to be shown; transparency is dropped."""
    return np.rot90(frame.to_ndarray(format="rgb24"), k=containers.quarter_turns(frame))
