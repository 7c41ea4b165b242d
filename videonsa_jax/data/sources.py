"""Conversations about videos and images from JSON and JSONL files, one at a time.

Two layouts are read, per record:
  LLaVA-Video-178K: {"video": PATH or [FRAME, ...], or "image" / "images": ..., "conversations":
    [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}
  ms-swift: {"images": [PATH, ...], "videos": [PATH or [FRAME, ...], ...], "messages":
    [{"role": "user", "content": "<image>..."}, {"role": "assistant", "content": "..."}]}
"""

import bisect
import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from videonsa_jax.data import chat
from videonsa_jax.data.chat import Message
from videonsa_jax.data.errors import BadSample, about_sample
from videonsa_jax.data.visuals import FrameFiles, ImageFile, Reference, VideoFile
from videonsa_jax.errors import UserError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES["system"] = "system"
TAG = re.compile("<image>|<video>")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One record, its files not yet opened."""

    name: str  # file and line, for messages
    messages: tuple[Message, ...]  # with chat.IMAGE and chat.VIDEO where visuals belong
    visuals: tuple[Reference, ...]  # in the order of the text


class Source(Protocol):
    """Random access to conversations; an item may raise BadSample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


class JsonSource:
    """The records of one file: a JSON array, or JSONL, of which only line offsets are kept."""

    def __init__(self, path: str | pathlib.Path, video_root: str | pathlib.Path | None = None):
        """Paths in the records are relative to `video_root`, or else to the file's folder.

        Raises:
          UserError: the file is missing, empty, or not a JSON array where it begins like one.
        """
        self._path = pathlib.Path(path)
        if not self._path.is_file():
            raise UserError(f"{path}: no such file; data.source lists JSON or JSONL files")
        self._root = pathlib.Path(video_root) if video_root else self._path.parent
        self._records, self._lines = None, ()
        with self._path.open("rb") as file:
            if file.read(4096).lstrip()[:1] == b"[":
                self._records = _json_array(self._path)
            else:
                file.seek(0)
                self._lines = _line_index(file)
        if not len(self):
            raise UserError(f"{path}: holds no record")

    def __len__(self) -> int:
        return len(self._lines) if self._records is None else len(self._records)

    def __getitem__(self, index: int) -> Conversation:
        """Raises BadSample: the record is not JSON, or not a conversation with its visuals."""
        if self._records is not None:
            return parse_record(self._records[index], f"{self._path}[{index}]", self._root)
        number, offset = self._lines[index].tolist()
        name = f"{self._path}:{number}"
        with self._path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BadSample(name, f"not readable as JSON: {error}") from error
        return parse_record(record, name, self._root)


class JoinedSource:
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Source]):
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Conversation:
        """Raises BadSample for whatever the part raises."""
        part = bisect.bisect_right(self._ends, index)
        with about_sample(f"record {index} of data.source"):
            return self._parts[part][index - self._ends[part] + len(self._parts[part])]


def parse_record(record: object, name: str, root: pathlib.Path) -> Conversation:
    """One record of either layout.

    Raises:
      BadSample: a part is missing or of the wrong type, or the tags in the text are not one per
        image and video of the record.
    """
    if not isinstance(record, dict):
        raise BadSample(name, f"a record must be a JSON object, not {type(record).__name__}")
    is_llava = "conversations" in record
    if not is_llava and "messages" not in record:
        raise BadSample(name, 'has neither "conversations" nor "messages"')
    role_key, text_key = ("from", "value") if is_llava else ("role", "content")
    turns = record["conversations" if is_llava else "messages"]
    if not isinstance(turns, list) or not turns:
        raise BadSample(name, "the conversation must be a list of at least one turn")
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get(text_key), str):
            raise BadSample(name, f'each turn must be an object with a text "{text_key}"')
        if turn.get(role_key) not in ROLES:
            raise BadSample(
                name, f'"{role_key}": {turn.get(role_key)!r} is not one of {", ".join(ROLES)}'
            )
    images, videos = _visuals(record, name, root)
    tags = [tag for turn in turns for tag in TAG.findall(turn[text_key])]
    if is_llava and len(tags) == 1 and len(images) > 1 and not videos:
        paths = tuple(image.path for image in images)  # one tag: the frames of one video
        images, videos = [], [FrameFiles(paths, _fps(record, name))]
    order = _match(tags, images, videos, name)
    placeholders = (chat.VIDEO if visual.is_video else chat.IMAGE for visual in order)
    messages = tuple(
        Message(ROLES[turn[role_key]], TAG.sub(lambda _: next(placeholders), turn[text_key]))
        for turn in turns
    )
    return Conversation(name, messages, tuple(order))


def _match(tags: list[str], images: list, videos: list, name: str) -> list[Reference]:
    """The visual that each tag stands for; `<image>` stands for a video where there is no image."""
    as_image = [tag == "<image>" and bool(images) for tag in tags]
    if as_image.count(True) != len(images) or as_image.count(False) != len(videos):
        raise BadSample(
            name,
            f"the text has {tags.count('<image>')} <image> and {tags.count('<video>')} <video> "
            f"tags for {len(images)} images and {len(videos)} videos",
        )
    left = {True: iter(images), False: iter(videos)}
    return [next(left[is_image]) for is_image in as_image]


def _visuals(record: dict, name: str, root: pathlib.Path) -> tuple[list[ImageFile], list]:
    """The record's images and videos, as references to files."""
    images = [
        ImageFile(_file(path, name, root))
        for key in ("image", "images")
        for path in _as_list(record.get(key))
    ]
    videos = []
    single = record.get("video")  # a path, or the frames of one video
    for entry in ([] if single is None else [single]) + _as_list(record.get("videos")):
        if not isinstance(entry, list):
            path = pathlib.Path(_file(entry, name, root))
            if not path.is_dir():
                videos.append(VideoFile(str(path)))
                continue
            entry = [str(frame) for frame in sorted(path.iterdir())]
        if not entry:
            raise BadSample(name, "a video given as a list of frames has zero frames")
        paths = tuple(_file(frame, name, root) for frame in entry)
        videos.append(FrameFiles(paths, _fps(record, name)))
    return images, videos


def _fps(record: dict, name: str) -> float | None:
    fps = record.get("fps")
    if fps is None:
        return None
    if isinstance(fps, bool) or not isinstance(fps, int | float) or fps <= 0:
        raise BadSample(name, f'"fps": {fps!r} must be a number above 0')
    return float(fps)


def _file(path: object, name: str, root: pathlib.Path) -> str:
    if not isinstance(path, str) or not path:
        raise BadSample(name, f"{path!r} is not the path of an image or video")
    return str(root / path)


def _as_list(value: object) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _json_array(path: pathlib.Path) -> list:
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not readable as a JSON array: {error}") from error
    return records


def _line_index(file) -> np.ndarray:
    """i64[lines 2]: number, from 1, and offset of each line that is not blank."""
    index, offset = [], 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            index.append((number, offset))
        offset += len(line)
    return np.array(index, np.int64).reshape(-1, 2)
