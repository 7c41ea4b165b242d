"""Videos with flipped bytes, missing parts, foreign headers: each is bad, or rightly read."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import av
import numpy as np
import pytest

from videonsa_jax.data.container import TOLERANT
from videonsa_jax.data.decoder_pool import DecoderPool
from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.sampling import Frames, SamplingRule
from videonsa_jax.data.visuals import VideoFile

RULE = SamplingRule(fps=8.0, min_frames=4, max_frames=16)
SIZE = (48, 64)
FORMATS = {"mp4": "libx264", "mkv": "libx264", "avi": "mpeg4", "ts": "mpeg2video", "webm": "libvpx"}
COUNT = 500
TIMEOUT_S = 60.0


@dataclasses.dataclass(frozen=True)
class Sequential:
    """The plain way to read a video: every whole frame, one after the other.

    By one thread, because how a decoder conceals damage depends on its threads.
    """

    name: str
    is_video = True

    def read(self, rule: SamplingRule, transform: Callable) -> list[np.ndarray]:
        del rule
        with av.open(self.name, **TOLERANT) as container:
            stream = container.streams.best("video")
            stream.codec_context.thread_count = 1
            images = []
            for packet in container.demux(stream):
                # What stands in front of the first keyframe cannot be decoded.
                with contextlib.nullcontext() if images else contextlib.suppress(av.FFmpegError):
                    whole = [frame for frame in packet.decode() if not frame.is_corrupt]
                    images += [transform(frame.to_ndarray(format="rgb24"), 0) for frame in whole]
            return images


def keep(image: np.ndarray, frames: int) -> np.ndarray:
    del frames
    return image


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> list[pathlib.Path]:
    """Moving noise, two seconds of it in each format."""
    folder = tmp_path_factory.mktemp("originals")
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    paths = [folder / f"a.{suffix}" for suffix in FORMATS]
    for path in paths:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(FORMATS[path.suffix[1:]], rate=16)
            stream.height, stream.width = SIZE
            stream.pix_fmt, stream.gop_size = "yuv420p", 8
            for i in range(32):
                image = np.roll(noise, i, axis=1) // 4 * 3 + i
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    return paths


@pytest.fixture(scope="module")
def mutants(originals, tmp_path_factory) -> list[pathlib.Path]:
    """Damaged files, always the same."""
    folder = tmp_path_factory.mktemp("mutants")
    contents = [path.read_bytes() for path in originals]
    paths = []
    for seed in range(COUNT):
        index = seed % len(originals)
        paths.append(folder / f"{seed}{originals[index].suffix}")
        rng = np.random.default_rng(seed)
        paths[-1].write_bytes(_mutate(contents[index], contents, rng))
    return paths


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    with DecoderPool(1, TIMEOUT_S) as pool:
        yield pool


def _mutate(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    kind = rng.choice(["flip", "flip header", "cut", "cut out", "zeros", "swap header", "double"])
    size = len(data)
    start, end = sorted(rng.integers(0, size, 2).tolist())
    if kind.startswith("flip"):
        changed = np.frombuffer(data, np.uint8).copy()
        within = min(size, 600) if kind == "flip header" else size
        places = rng.integers(0, within, rng.integers(1, 30))
        changed[places] ^= rng.integers(1, 256, len(places), np.uint8)
        return changed.tobytes()
    if kind == "cut":
        return data[:end]
    if kind == "cut out":
        return data[:start] + data[end:]
    if kind == "zeros":
        return data[:start] + bytes(end - start) + data[end:]
    if kind == "double":
        return data[:end] + data[start:]
    other = others[rng.integers(len(others))]
    length = int(rng.integers(16, 1000))
    return other[:length] + data[length:]


def read_all(pool: DecoderPool, paths: list[pathlib.Path]) -> dict[pathlib.Path, Frames]:
    """The frames of those that are not bad; nothing hangs, and nothing crashes."""
    found, lost = {}, []
    for path in paths:
        video = VideoFile(str(path))
        try:
            count = pool.outline(video, RULE).frames
            found[path] = pool.read(video, RULE, keep)
        except BadSample as bad:
            lost += [bad] if bad.lost_in else []
        else:
            assert len(found[path].images) == count, path
    assert not lost
    return found


def test_damaged_videos_are_bad_or_have_frames_and_times(pool, mutants):
    found = read_all(pool, mutants)
    assert COUNT // 10 < len(found) < COUNT * 9 // 10  # or the damage is of the wrong strength
    for path, frames in found.items():
        count = len(frames.images)
        assert count in range(2, RULE.max_frames + 1, 2), path
        assert frames.images.dtype == np.uint8
        assert len(frames.seconds) == len(frames.indices) == count, path
        assert np.isfinite(frames.seconds).all(), path
        assert (np.diff(frames.seconds) >= 0).all(), path
        assert 0 < frames.sampled_fps < np.inf, path


def unequal(pool: DecoderPool, found: dict[pathlib.Path, Frames]) -> list[str]:
    """Names of those whose frames are not those of a sequential decode."""
    names = []
    for path, frames in found.items():
        every = pool.read(Sequential(str(path)), RULE, keep)
        chosen = [every[i] for i in frames.indices if i < len(every)]
        if not np.array_equal(frames.images, chosen):
            names.append(path.name)
    return names


def test_nearly_all_damaged_videos_are_bad_or_read_as_a_sequential_decode_gives(pool, mutants):
    # What FFmpeg makes of damaged blocks may be what lay in a buffer before, so it depends on which
    # earlier frames are still held: two plain decodes of such a file differ, too. Seen: 5 of 500.
    assert len(unequal(pool, read_all(pool, mutants))) <= COUNT // 50


@pytest.mark.parametrize("suffix", FORMATS)
def test_whole_videos_are_read_as_a_sequential_decode_gives(pool, originals, suffix):
    paths = [path for path in originals if path.suffix == f".{suffix}"]
    found = read_all(pool, paths)
    assert list(found) == paths
    assert unequal(pool, found) == []
