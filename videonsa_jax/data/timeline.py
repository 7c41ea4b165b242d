"""When each frame of a video is shown: predicted from its packets, or found by decoding all of it.

Decoding is the truth. Packets tell the same in most files, for much less work, so they are asked
first; what is predicted from them is compared with the frames as they are decoded (`video.py`).
Frame counts and mean rates in headers are never believed.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from videonsa_jax.data import container as containers
from videonsa_jax.data.errors import BadSample

# One packet is one frame there (hidden frames of VP8 and VP9 apart), and seeking is exact. In other
# files packets may be empty, hold half a frame or several, or have the times of other frames.
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
    keyframes: tuple[tuple[int, int], ...] = ()  # (frame, timestamp to seek to), to decode from
    is_reliable: bool = False  # no need to decode all of it to count the frames
    is_decoded: bool = False  # found by decoding, not predicted

    @property
    def total(self) -> int:
        return len(self.pts)

    def sampled_fps(self, indices: np.ndarray) -> float:
        """Sampled frames per second of video; where the rate varies, by the times of these."""
        if self.is_constant:
            return len(indices) / self.total * self.fps
        return float((len(indices) - 1) / (self.seconds[indices[-1]] - self.seconds[indices[0]]))


def predict(path: str | pathlib.Path) -> Timeline | None:
    """The timeline that the packets tell of; None where their timestamps cannot be one.

    Raises:
      BadSample: the file is missing, is not a video, or is truncated.
    """
    shown = []  # (pts, dts, whether decoding can start here)
    with containers.opened(path) as (container, stream):
        name, codec = container.format.name, stream.codec_context.name
        for packet in container.demux(stream):
            if packet.is_corrupt:
                shown.append((None, None, False))
            elif packet.size and not packet.is_discard and not _is_hidden(packet, codec):
                shown.append((packet.pts, packet.dts, packet.is_keyframe))
        truncated = containers.missing_end(path, stream)
        if truncated:
            raise BadSample(str(path), truncated)
        if len(shown) < 2 or any(pts is None for pts, _, _ in shown) or name == "avi":
            return None
        shown.sort(key=lambda packet: packet[0])
        pts = [pts for pts, _, _ in shown]
        if len(set(pts)) < len(pts):
            return None
        return dataclasses.replace(
            _timeline(path, pts, container, stream),
            keyframes=tuple(
                (i, pts if dts is None else dts) for i, (pts, dts, key) in enumerate(shown) if key
            ),
            is_reliable=name.startswith(RELIABLE_CONTAINERS) and codec in RELIABLE_CODECS,
        )


def opening_size(path: str | pathlib.Path, timeline: Timeline) -> tuple[int, int] | None:
    """(height, width) of the first frame; None where the first ones are not those predicted."""
    second_keyframe = timeline.keyframes[1][0] if len(timeline.keyframes) > 1 else timeline.total
    count = min(second_keyframe + 1, CHECKED, timeline.total)
    with containers.opened(path) as (container, stream):
        frames = containers.whole_frames(container, stream)
        first = next(frames, None)
        if first is None:
            return None
        decoded = [first.pts, *(f.pts for f in itertools.islice(frames, count - 1))]
        extra = next(frames, None) if count == timeline.total else None
    is_right = extra is None and tuple(decoded) == timeline.pts[:count]
    return containers.shown_size(first) if is_right else None


def scan(path: str | pathlib.Path) -> tuple[Timeline, tuple[int, int]]:
    """Decodes all of a video: its timeline, and (height, width) of the first frame.

    Raises:
      BadSample: the file is missing, is not a video, or does not decode.
    """
    pts, size = [], None
    with containers.opened(path) as (container, stream):
        for frame in containers.whole_frames(container, stream):
            pts.append(frame.pts)
            size = size or containers.shown_size(frame)
        if size is None:
            raise BadSample(str(path), "has no frame that decodes")
        return dataclasses.replace(_timeline(path, pts, container, stream), is_decoded=True), size


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
        if np.abs(ticks - count / (rate * tick)).max() <= 1:  # each is rounded to a tick
            return Timeline(tuple(pts), ticks * tick, rate, is_constant=True)
    # how long the last frame is shown is not known: as long as most. Half a tick more, so that
    # rounding does not take a frame from 20 s
    length = int(ticks[-1]) + float(np.median(np.diff(ticks))) + 0.5 if len(pts) > 1 else 1
    return Timeline(tuple(pts), ticks * tick, len(pts) / (length * tick), is_constant=False)


def _is_hidden(packet: av.Packet, codec: str) -> bool:
    """Whether a packet of VP8 or VP9 only prepares later frames."""
    if codec not in ("vp8", "vp9"):
        return False
    first = bytes(memoryview(packet)[:1])[0]
    if codec == "vp8":
        return not first >> 4 & 1  # show_frame
    last = bytes(memoryview(packet)[-1:])[0]
    if last >> 5 == 0b110:
        return False  # a superframe: hidden frames together with the one that is shown
    bits = f"{first:08b}"
    after_profile = 5 if bits[2:4] == "11" else 4
    shows_existing, is_shown = bits[after_profile] == "1", bits[after_profile + 2] == "1"
    return not (shows_existing or is_shown)
