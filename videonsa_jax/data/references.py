"""What a record names as its image or video -> a reference to it, not yet opened."""

import base64
import binascii
import os
import pathlib
import re
import reprlib
from urllib.parse import unquote_to_bytes

from PIL import Image

from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.visuals import Encoded, FrameFiles, ImageFile, VideoFile

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes that file systems take
HIGHEST_FPS = 10_000
URI = re.compile(r"(?P<scheme>data|file):|(?P<remote>[a-z][a-z0-9+.-]*)://", re.IGNORECASE)
LOCAL = re.compile(r"file:(?://(?:localhost)?)?(/(?!/).*)", re.IGNORECASE | re.DOTALL)
DIGITS = re.compile(r"(\d+)")


def image_reference(entry: object, name: str, root: pathlib.Path) -> ImageFile | Encoded:
    """A picture: a path, a file:// or data: URI, or Hugging Face's {"path": ..., "bytes": ...}.

    Args:
      entry: from the record; `bytes` is base64 text.
      name: of the record, for messages.
      root: where relative paths start.

    Raises:
      BadSample: it is something else, or its data is not base64.
    """
    if isinstance(entry, dict) and isinstance(entry.get("bytes"), str):
        return _encoded(entry["bytes"].encode(errors="replace"), f"{name}, bytes", is_base64=True)
    if isinstance(entry, str) and _scheme(entry) == "data":
        head, _, data = entry.partition(",")
        is_base64 = head.replace(" ", "").lower().endswith(";base64")
        data = unquote_to_bytes(data.encode(errors="replace"))
        return _encoded(data, f"{name}, {head[:40]}", is_base64=is_base64)
    return ImageFile(_path(entry, name, root))


def video_reference(
    entry: object, fps: object, name: str, root: pathlib.Path
) -> VideoFile | FrameFiles:
    """A video: a path or file:// URI of a file or of a folder of frames, or a list of frames.

    Args:
      entry: from the record.
      fps: the record's, of a video that is given as its frames; None where it is not known.
      name: of the record, for messages.
      root: where relative paths start.

    Raises:
      BadSample: it is something else, or a video of no frames, or its `fps` is no rate.
    """
    if isinstance(entry, list):
        paths = [_path(frame, name, root) for frame in entry]
    else:
        path = _path(entry, name, root)
        if not os.path.isdir(path):
            return VideoFile(path)
        paths = _frames(path, name)
    if not paths:
        raise BadSample(name, "a video given as a list of frames has zero frames")
    if fps is not None and (
        isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= HIGHEST_FPS
    ):
        raise BadSample(name, f'"fps": {fps!r} must be a number above 0, at most {HIGHEST_FPS}')
    return FrameFiles(tuple(paths), None if fps is None else float(fps))


def _path(entry: object, name: str, root: pathlib.Path) -> str:
    if isinstance(entry, dict) and not entry.get("bytes"):
        entry = entry.get("path")
    if not isinstance(entry, str) or not entry:
        raise BadSample(name, f"{reprlib.repr(entry)} is not the path of an image or video")
    scheme = _scheme(entry)
    if scheme == "file":
        entry = _local_path(entry, name)
    elif scheme == "data":
        raise BadSample(name, "a video or frame as a data: URI is not read; save it as a file")
    elif scheme:
        raise BadSample(
            name, f"{reprlib.repr(entry)}: nothing is fetched by {scheme}://; name a local file"
        )
    path = root / entry
    try:
        longest = max(len(os.fsencode(part)) for part in path.parts)
        whole = len(os.fsencode(path))
    except UnicodeEncodeError as error:
        raise BadSample(name, f"{reprlib.repr(entry)} cannot be the name of a file") from error
    if longest > LONGEST_NAME or whole > LONGEST_PATH:
        raise BadSample(
            name,
            f"{reprlib.repr(entry)} has a part of {longest} bytes and {whole} in all; the name of "
            f"a file may have {LONGEST_NAME}, a path {LONGEST_PATH}",
        )
    return str(path)


def _scheme(entry: str) -> str | None:
    found = URI.match(entry)
    return found and (found["scheme"] or found["remote"]).lower()


def _local_path(uri: str, name: str) -> str:
    """The path in a file: URI. "#" and "?" belong to it: nobody escapes them in names of files."""
    found = LOCAL.fullmatch(uri)
    if not found:
        raise BadSample(name, f"{reprlib.repr(uri)} is no local path; write file:///FOLDER/FILE")
    return os.fsdecode(unquote_to_bytes(found[1].encode(errors="surrogatepass")))


def _encoded(data: bytes, name: str, *, is_base64: bool) -> Encoded:
    if is_base64:
        data = b"".join(data.split())
        try:
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
        except binascii.Error as error:
            raise BadSample(name, f"its data is not base64: {error}") from error
    return Encoded(name, (data,), (0.0,), 1.0, is_video=False)


def _frames(folder: str, name: str) -> list[str]:
    """Paths of a folder's images, in the order of the numbers in their names."""
    suffixes = _image_suffixes()
    try:
        paths = [
            pathlib.Path(entry.path)
            for entry in os.scandir(folder)
            if not entry.name.startswith(".")
            and pathlib.Path(entry.name).suffix.lower() in suffixes
            and not entry.is_dir()
        ]
    except OSError as error:
        raise BadSample(name, f"{folder}: not a readable folder: {error.strerror}") from error
    if not paths:
        raise BadSample(name, f"{folder}: a folder without image files, so a video of zero frames")
    return [str(path) for path in sorted(paths, key=_natural)]


def _image_suffixes() -> set[str]:
    """Of the formats that Pillow opens."""
    suffixes = Image.registered_extensions()
    return {suffix for suffix, image_format in suffixes.items() if image_format in Image.OPEN}


def _natural(path: pathlib.Path) -> tuple:
    """Orders frame_2 before frame_10."""
    parts = DIGITS.split(path.stem)  # text and digits by turns
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name
