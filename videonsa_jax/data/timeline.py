"""When each frame of a video is shown: predicted from its packets, or found by decoding all of it.

Decoding is the truth. An MP4's index or a file's packets tell the same in most files, for much less
work, so they are asked first, and what they tell is compared with frames as they are decoded.
Frame counts and mean rates in headers are never believed.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from videonsa_jax.data import container as containers
from videonsa_jax.data.errors import BadSample

# One packet is one frame there (hidden frames of VP8 apart), and seeking is exact. In other files
# packets may be empty, hold half a frame or several, or have the times of other frames.
RELIABLE_CONTAINERS = ("mov,mp4", "matroska,webm")
RELIABLE_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mjpeg", "prores")
CHECKED = 64  # frames of a file's opening that are decoded to check its packets


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The frames of one video, in the order of showing."""

    pts: tuple[int | None, ...]  # the timestamp of each frame, in the stream's time base
    seconds: np.ndarray  # f64[total], from the first frame
    fps: float  # frames per second, on average where the rate varies
    is_constant: bool  # whether the frames lie 1 / fps apart
    keyframes: tuple[int, ...] = ()  # the frames from which decoding can start
    is_reliable: bool = False  # no need to decode all of it to count the frames

    @property
    def total(self) -> int:
        return len(self.pts)

    def sampled_fps(self, indices: np.ndarray) -> float:
        """Sampled frames per second of video; where the rate varies, by the times of these."""
        if self.is_constant:
            return len(indices) / self.total * self.fps
        return float((len(indices) - 1) / (self.seconds[indices[-1]] - self.seconds[indices[0]]))


def predict_from_index(path: str | pathlib.Path) -> Timeline | None:
    """The timeline of an MP4 file with frames of a constant rate, without reading all of the file.

    None for all others. Raises like `predict`.
    """
    with containers.opened(path) as (container, stream):
        entries = stream.index_entries
        if (
            not _is_reliable(container, stream)
            or not containers.has_whole_index(path)
            or len(entries) < 2
            or any(entry.is_discard or not entry.size for entry in entries)
        ):
            return None
        _check_end(path, stream)
        # the index has times of decoding; where they are evenly spaced, so are those of showing
        timeline = _timeline(path, [entry.timestamp for entry in entries], container, stream)
        return dataclasses.replace(timeline, is_reliable=True) if timeline.is_constant else None


def predict(path: str | pathlib.Path) -> Timeline | None:
    """The timeline that the packets tell of; None where their timestamps cannot be one.

    Raises:
      BadSample: the file is missing, is not a video, or is truncated.
    """
    shown = []  # (pts, whether decoding can start here)
    with containers.opened(path) as (container, stream):
        for packet in containers.packets_of(container, stream):
            if packet.is_corrupt:
                shown.append((None, False))
            elif _is_shown(packet):
                shown.append((packet.pts, packet.is_keyframe))
        _check_end(path, stream)
        times = {pts for pts, _ in shown}
        if len(times) < max(len(shown), 2) or None in times or container.format.name == "avi":
            return None
        shown.sort()
        return dataclasses.replace(
            _timeline(path, [pts for pts, _ in shown], container, stream),
            keyframes=tuple(i for i, (_, is_keyframe) in enumerate(shown) if is_keyframe),
            is_reliable=_is_reliable(container, stream),
        )


def opening_size(path: str | pathlib.Path) -> tuple[int, int] | None:
    """(height, width) of the first frame; None where the first ones are not what packets tell."""
    told, decoded, keyframes, size = [], [], [], None
    with containers.opened(path) as (container, stream):

        def packets() -> Iterator[av.Packet]:
            for packet in containers.packets_of(container, stream):
                if _is_shown(packet):
                    told.append(packet.pts)
                    keyframes.extend([packet.pts] if packet.is_keyframe else [])
                yield packet

        for frame in containers.whole_frames(packets()):
            size = size or containers.shown_size(frame)
            decoded.append(frame.pts)
            if len(decoded) == CHECKED or (len(keyframes) > 1 and frame.pts >= keyframes[1]):
                told = sorted(told)[: len(decoded)]
                break
    return size if decoded == sorted(told) else None


def scan(path: str | pathlib.Path) -> tuple[Timeline, tuple[int, int]]:
    """Decodes all of a video: its timeline, and (height, width) of the first frame.

    Raises:
      BadSample: the file is missing, is not a video, or does not decode.
    """
    pts, size = [], None
    with containers.opened(path) as (container, stream):
        for frame in containers.whole_frames(containers.packets_of(container, stream)):
            pts.append(frame.pts)
            size = size or containers.shown_size(frame)
        if size is None:
            raise BadSample(str(path), "has no frame that decodes")
        return _timeline(path, pts, container, stream), size


def _timeline(
    path: str | pathlib.Path,
    pts: Sequence[int | None],
    container: InputContainer,
    stream: VideoStream,
) -> Timeline:
    count, tick = np.arange(len(pts)), float(stream.time_base)
    rates = [stream.average_rate, stream.guessed_rate, stream.base_rate]
    rates = [float(rate) for rate in rates if rate]
    are_times = None not in pts
    if are_times:
        times = np.array(pts, np.int64)
        if container.format.name == "avi":
            times.sort()  # AVI numbers its packets; a frame has the number of another one's
        ticks = times - times[0]
        are_times = (np.diff(ticks) >= 0).all() and (len(pts) == 1 or ticks[-1] > 0)
    if not are_times:
        if not rates:
            raise BadSample(str(path), "has neither timestamps in order nor a frame rate")
        return Timeline(tuple(pts), count / rates[0], rates[0], is_constant=True)
    for rate in rates:
        frame = 1 / (rate * tick)  # in ticks
        if np.abs(ticks - count * frame).max() < frame / 2:  # cameras and rounding are not exact
            return Timeline(tuple(pts), ticks * tick, rate, is_constant=True)
    # how long the last frame is shown is not known: as long as most. Half a tick more, so that
    # rounding does not take a frame from 20 s
    length = int(ticks[-1]) + float(np.median(np.diff(ticks))) + 0.5 if len(pts) > 1 else 1
    return Timeline(tuple(pts), ticks * tick, len(pts) / (length * tick), is_constant=False)


def _check_end(path: str | pathlib.Path, stream: VideoStream) -> None:
    truncated = containers.missing_end(path, stream)
    if truncated:
        raise BadSample(str(path), truncated)


def _is_reliable(container: InputContainer, stream: VideoStream) -> bool:
    codec = stream.codec_context.codec.canonical_name
    return container.format.name.startswith(RELIABLE_CONTAINERS) and codec in RELIABLE_CODECS


def _is_shown(packet: av.Packet) -> bool:
    """Whether a frame comes of a packet; some of VP8 only prepare later frames."""
    if not packet.size or packet.is_discard:
        return False
    is_vp8 = packet.stream.codec_context.codec.canonical_name == "vp8"
    return not is_vp8 or bool(memoryview(packet)[0] >> 4 & 1)  # the bit show_frame
