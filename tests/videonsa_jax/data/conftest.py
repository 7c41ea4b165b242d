"""Tiny videos, a tiny tokenizer and a model config that goes with it."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from fractions import Fraction

import av
import numpy as np
import pytest

from videonsa_jax.config import schema as config
from videonsa_jax.data import tokenizer as tokenizers
from videonsa_jax.data.tokenizer import Tokenizer

WIDTH, HEIGHT = 64, 48


def write_video(
    path: pathlib.Path,
    *,
    frames: int = 24,
    fps: int = 24,
    codec: str = "libx264",
    keyframe_every: int = 12,
    times: Sequence[float] | None = None,
    faststart: bool = False,
) -> pathlib.Path:
    """From black to white; `times` (seconds, one per frame) makes the frame rate variable."""
    options = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.gop_size = keyframe_every
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            image = np.full((HEIGHT, WIDTH, 3), 255 * i // max(frames - 1, 1), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(path: pathlib.Path, fraction: float) -> pathlib.Path:
    """Keeps the first part of a file's bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path


def spoil(path: pathlib.Path) -> pathlib.Path:
    """Overwrites bytes near the end of a file, whose index stands in front (`faststart`)."""
    data = bytearray(path.read_bytes())
    data[-400:-50] = bytes(350)
    path.write_bytes(data)
    return path


@pytest.fixture(scope="session")
def make_video() -> Callable[..., pathlib.Path]:
    return write_video


@pytest.fixture(scope="session")
def truncate() -> Callable[..., pathlib.Path]:
    return cut


@pytest.fixture(scope="session")
def damage() -> Callable[..., pathlib.Path]:
    return spoil


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = ["What colour flashes up first in the video?", "the red square", "You are a helpful"]
    tokenizers.train_bpe(texts * 4, 320, directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir) -> Tokenizer:
    return Tokenizer.from_dir(tokenizer_dir)


@pytest.fixture(scope="session")
def model(tokenizer) -> config.ModelConfig:
    """The tiny model with the tokenizer's ids."""
    return dataclasses.replace(
        config.PRESETS["tiny"],
        image_token_id=tokenizer.image_pad,
        video_token_id=tokenizer.video_pad,
        vision_start_token_id=tokenizer.vision_start,
    )


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[..., pathlib.Path]:
    def write(path: pathlib.Path, records: Sequence[dict]) -> pathlib.Path:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write
