"""Videos whose decoders misbehave, by their names, in whichever process opens them."""

import dataclasses
import json
import os
import pathlib
import time

import numpy as np
from PIL import Image

from videonsa_jax.data.sampling import Frames, SamplingRule, Transform, frames_from_arrays
from videonsa_jax.data.sources import Conversation, JsonSource
from videonsa_jax.data.visuals import Outline, VideoFile

STAGES = ("outline", "read")
ERRORS = {
    "disk": OSError(5, "Input/output error"),
    "memory": MemoryError("picture of 9 GiB"),
    "bomb": Image.DecompressionBombError("too many pixels"),
    "unicode": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "overflow": OverflowError("Python int too large to convert to C long"),
    "runtime": RuntimeError("a bug of the decoder"),
    "key": KeyError("no such stream"),
}


@dataclasses.dataclass(frozen=True)
class BadDecoder:
    """PATH/STAGE-FAULT.mp4: a video of four grey frames, but STAGE does not get so far."""

    name: str
    is_video = True

    def outline(self, rule: SamplingRule) -> Outline:
        self._meet("outline")
        return Outline(4, 56, 56)

    def read(self, rule: SamplingRule, transform: Transform) -> Frames:
        self._meet("read")
        grey = np.full((56, 56, 3), 128, np.uint8)
        return frames_from_arrays([transform(grey, 4)] * 4, fps=rule.fps)

    def _meet(self, stage: str) -> None:
        path = pathlib.Path(self.name)
        with path.with_suffix(".tries").open("a") as file:
            file.write(stage + "\n")
        bad_stage, fault = path.stem.split("-")
        if stage != bad_stage:
            return
        if fault == "hang":
            time.sleep(3600)
        if fault == "abort":
            os.abort()
        if fault == "exit":
            os._exit(3)
        raise ERRORS[fault]


class Source(JsonSource):
    """For training: workers take it along."""

    def __getitem__(self, index: int) -> Conversation:
        found = super().__getitem__(index)
        visuals = (video_file(v.path) if isinstance(v, VideoFile) else v for v in found.visuals)
        return dataclasses.replace(found, visuals=tuple(visuals))


def video_file(path: str) -> BadDecoder | VideoFile:
    """The video, or what its name says; in place of `references.VideoFile`."""
    is_bad = pathlib.Path(path).stem.split("-")[0] in STAGES
    return BadDecoder(path) if is_bad else VideoFile(path)


def tries(path: str | pathlib.Path) -> list[str]:
    """The stages that were begun, in order."""
    file = pathlib.Path(path).with_suffix(".tries")
    return file.read_text().split() if file.exists() else []


def listed(path: pathlib.Path) -> dict[str, str]:
    """Name without folder -> reason."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {pathlib.Path(row["file"]).stem: row["reason"] for row in rows}
