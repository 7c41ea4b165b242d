"""Video files and lists of frame images -> sampled frames, by Qwen's published rules (PyAV).

Frames are identified by their own timestamps, so a variable frame rate changes nothing; between two
sampled frames the decoder runs forward from the nearest keyframe, so that every frame is exact.
"""

import contextlib
import dataclasses
import io
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence

import av
import numpy as np
from PIL import Image

from videonsa_jax.data.errors import BadSample

FRAME_FACTOR = 2  # sampled frames are a multiple of this
DAMAGED = "truncated or damaged"

# (u8[h w 3] frame, number of sampled frames) -> u8[h' w' 3]; applied frame by frame, so that a
# long video is never held at full size
Transform = Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Frames:
    """What was sampled from one video."""

    images: np.ndarray  # u8[f h w 3], RGB
    seconds: np.ndarray  # f32[f] when each frame is shown
    indices: np.ndarray  # i32[f] which frame of the video it is
    sampled_fps: float  # sampled frames per second of video


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What the container says, and the size of the first frame as it is shown."""

    frames: int
    fps: float  # mean frames per second
    height: int
    width: int


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


def probe(path: str | pathlib.Path) -> VideoInfo:
    """Frame count, rate and size of a video, from its header and its first frame.

    Raises:
      BadSample: the file is missing, is not a video, or has no frame that decodes.
    """
    with _opened(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise BadSample(str(path), "has zero frames")
        height, width = _upright(first).shape[:2]
        frames, rate = stream.frames, stream.average_rate
    if not frames or not rate:
        scan = _scan(path)
        frames, rate = scan.total, scan.fps
    return VideoInfo(frames, float(rate), height, width)


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
      BadSample: the file is missing, not a video, has no frames, or ends before it should.
    """
    scan = _scan(path)
    count = SamplingRule(fps, min_frames, max_frames).count(scan.total, scan.fps, path)
    indices = frame_indices(scan.total, count)
    images: dict[int, np.ndarray] = {}
    for index, frame in _decode(path, scan, indices):
        image = _upright(frame)
        images[index] = image if transform is None else transform(image, count)
    missing = [i for i in indices.tolist() if i not in images]
    if missing:
        raise BadSample(
            str(path), f"frame {missing[0]} of {scan.total} does not decode: the file is {DAMAGED}"
        )
    if len({image.shape for image in images.values()}) > 1:
        raise BadSample(str(path), "its frames change size")
    return Frames(
        images=np.stack([images[i] for i in indices.tolist()]),
        seconds=scan.seconds[indices].astype(np.float32),
        indices=indices,
        sampled_fps=count / scan.total * scan.fps,
    )


def frames_from_images(
    paths: Sequence[str | pathlib.Path], *, fps: float, transform: Transform | None = None
) -> Frames:
    """A list of frame images as a video: all of them, the last one repeated to an even number.

    Args:
      paths: in the order of time, all of one size.
      fps: how many of them make a second.
      transform: applied to each frame.

    Raises:
      BadSample: the list is empty, a file is missing or unreadable, or sizes differ.
    """
    if not paths:
        raise BadSample("(no file)", "a video given as a list of frame images has zero frames")
    count = math.ceil(len(paths) / FRAME_FACTOR) * FRAME_FACTOR
    images: list[np.ndarray] = []
    size = None
    for path in paths:
        image = read_image(path)
        size = size or image.shape
        if image.shape != size:
            raise BadSample(
                str(path),
                f"is {image.shape[1]}x{image.shape[0]}, the frames before it are "
                f"{size[1]}x{size[0]}: frames of one video must have one size",
            )
        images.append(image if transform is None else transform(image, count))
    return frames_from_arrays(images + images[-1:] * (count - len(images)), fps=fps)


def frames_from_arrays(images: Sequence[np.ndarray], *, fps: float) -> Frames:
    """Frames u8[h w 3] that lie 1 / `fps` seconds apart."""
    indices = np.arange(len(images), dtype=np.int32)
    return Frames(np.stack(images), (indices / fps).astype(np.float32), indices, float(fps))


def read_image(path: str | pathlib.Path, data: bytes | None = None) -> np.ndarray:
    """An image file as u8[h w 3]; `data`, where given, is what the file holds.

    Raises:
      BadSample: the file is missing, not an image, or truncated.
    """
    with _opened_image(path, data) as image:
        return np.asarray(image.convert("RGB"))


def image_size(path: str | pathlib.Path, data: bytes | None = None) -> tuple[int, int]:
    """(height, width) of an image file, from its header; raises like `read_image`."""
    with _opened_image(path, data) as image:
        return image.height, image.width


@contextlib.contextmanager
def _opened_image(path: str | pathlib.Path, data: bytes | None) -> Iterator[Image.Image]:
    if data is None and not pathlib.Path(path).is_file():
        raise BadSample(str(path), "no such file")
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as image:
            yield image
    except (OSError, SyntaxError) as error:  # what Pillow raises for broken files
        raise BadSample(str(path), f"not a readable image: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Scan:
    """Where the frames of a stream are, known without decoding."""

    total: int
    fps: float
    pts: np.ndarray  # i64[total] in the order of showing; empty where frames have no timestamps
    keyframes: np.ndarray  # i64[.] pts from which decoding can start
    seconds: np.ndarray  # f64[total]


@contextlib.contextmanager
def _opened(path: str | pathlib.Path) -> Iterator[tuple]:
    """(container, its first video stream); everything FFmpeg raises becomes a BadSample."""
    if not pathlib.Path(path).is_file():
        raise BadSample(str(path), "no such file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadSample(str(path), f"has no video stream: not a video, or {DAMAGED}")
            yield container, container.streams.video[0]
    except av.error.FFmpegError as error:
        raise BadSample(
            str(path), f"not a readable video, or {DAMAGED}: {error.strerror}"
        ) from error


def _scan(path: str | pathlib.Path) -> _Scan:
    """Reads all packets of the video stream.

    Raises:
      BadSample: there are none, or fewer than the header promises, or one is cut off.
    """
    with _opened(path) as (container, stream):
        packets = [p for p in container.demux(stream) if p.size]
        promised, time_base = stream.frames, stream.time_base
        start, rate = stream.start_time or 0, stream.average_rate
        has_timestamps = container.format.name != "avi"  # AVI's are guessed from the file's order
    total = promised or len(packets)
    if not total:
        raise BadSample(str(path), "has zero frames")
    if len(packets) < total or any(p.is_corrupt for p in packets):
        whole = sum(not p.is_corrupt for p in packets)
        raise BadSample(str(path), f"holds {whole} whole frames of {total}: the file is {DAMAGED}")
    pts = np.array([-1 if p.pts is None else p.pts for p in packets], np.int64)
    keyframes = np.sort(pts[[p.is_keyframe for p in packets]])
    pts = np.sort(pts)[:total]
    if not has_timestamps or (np.diff(pts) <= 0).any():  # count frames instead
        fps = float(rate or 0)
        if not fps:
            raise BadSample(str(path), "has neither timestamps nor a frame rate")
        return _Scan(total, fps, pts[:0], keyframes, np.arange(total) / fps)
    seconds = (pts - start) * float(time_base)
    length = seconds[-1] - seconds[0]
    fps = float(rate or ((total - 1) / length if length else 1))
    return _Scan(total, fps, pts, keyframes, seconds)


def _decode(path: str | pathlib.Path, scan: _Scan, indices: np.ndarray) -> Iterator[tuple]:
    """Yields (index, frame) of the wanted frames that decode, in the order of showing."""
    wanted = sorted(set(indices.tolist()))
    with _opened(path) as (container, stream):
        if not len(scan.pts):
            chosen = set(wanted)
            for index, frame in enumerate(container.decode(stream)):
                if index in chosen and not frame.is_corrupt:
                    yield index, frame
            return
        position, frames = -math.inf, container.decode(stream)
        for index in wanted:
            target = int(scan.pts[index])
            before = scan.keyframes[scan.keyframes <= target]
            if len(before) and before[-1] > position > -math.inf:
                container.seek(int(before[-1]), stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                position = frame.pts
                if position >= target:
                    break
            else:
                return
            if position == target and not frame.is_corrupt:
                yield index, frame


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """u8[h w 3], turned as the file says it is to be shown."""
    return np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90) % 4)
