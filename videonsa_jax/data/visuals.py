"""Where one image or video of a conversation is, how large it will be, and how to read it."""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

from videonsa_jax.data import images, video
from videonsa_jax.data.sampling import (
    Frames,
    SamplingRule,
    Transform,
    frame_indices,
    frames_from_arrays,
)


class Outline(NamedTuple):
    """What is known of a visual without decoding all of it."""

    frames: int  # that will be sampled
    height: int  # of a frame, before resizing
    width: int
    candidates: float | None = None  # frames at the rule's fps, unbounded; None: not to be filtered


class Reference(Protocol):
    """An unopened image or video, picklable. Both methods raise BadSample."""

    is_video: bool

    @property
    def name(self) -> str:
        """The file, for messages and for lists of bad ones."""

    def outline(self, rule: SamplingRule) -> Outline: ...

    def read(self, rule: SamplingRule, transform: Transform) -> Frames: ...


@dataclasses.dataclass(frozen=True)
class VideoFile:
    """A video to sample frames from."""

    path: str
    is_video = True

    @property
    def name(self) -> str:
        return self.path

    def outline(self, rule: SamplingRule) -> Outline:
        info = video.probe(self.path)
        count = rule.count(info.frames, info.fps, self.path)
        return Outline(count, info.height, info.width, info.frames / info.fps * rule.fps)

    def read(self, rule: SamplingRule, transform: Transform) -> Frames:
        return video.sample_frames(
            self.path,
            fps=rule.fps,
            min_frames=rule.min_frames,
            max_frames=rule.max_frames,
            transform=transform,
        )


@dataclasses.dataclass(frozen=True)
class FrameFiles:
    """A video given as its frames: all are used, or, where their `fps` is known, sampled."""

    paths: tuple[str, ...]
    fps: float | None
    is_video = True

    @property
    def name(self) -> str:
        return self.paths[0]

    def outline(self, rule: SamplingRule) -> Outline:
        paths, _ = self._chosen(rule)
        height, width = images.image_size(paths[0])
        candidates = len(self.paths) / (self.fps or rule.fps) * rule.fps
        return Outline(len(paths) + len(paths) % 2, height, width, candidates)

    def read(self, rule: SamplingRule, transform: Transform) -> Frames:
        paths, fps = self._chosen(rule)
        return images.frames_from_images(paths, fps=fps, transform=transform)

    def _chosen(self, rule: SamplingRule) -> tuple[tuple[str, ...], float]:
        total = len(self.paths)
        if self.fps is None:
            return self.paths, rule.fps
        count = rule.count(total, self.fps, self.paths[0])
        indices = frame_indices(total, count).tolist()
        return tuple(self.paths[i] for i in indices), count / total * self.fps


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """One picture."""

    path: str
    is_video = False

    @property
    def name(self) -> str:
        return self.path

    def outline(self, rule: SamplingRule) -> Outline:
        return Outline(1, *images.image_size(self.path))

    def read(self, rule: SamplingRule, transform: Transform) -> Frames:
        return frames_from_arrays([transform(images.read_image(self.path), 1)], fps=rule.fps)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A picture, or the frames of a video that was sampled before, as bytes of image files."""

    name: str
    images: tuple[bytes, ...]
    seconds: tuple[float, ...]  # when each is shown
    sampled_fps: float
    is_video: bool

    def outline(self, rule: SamplingRule) -> Outline:
        return Outline(len(self.images), *images.image_size(self.name, self.images[0]))

    def read(self, rule: SamplingRule, transform: Transform) -> Frames:
        count = len(self.images)
        arrays = [transform(images.read_image(self.name, data), count) for data in self.images]
        frames = frames_from_arrays(arrays, fps=self.sampled_fps)
        return dataclasses.replace(frames, seconds=np.array(self.seconds, np.float32))
