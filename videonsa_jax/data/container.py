"""Open video files: the stream that is the video, its frames, and what shows a file to be cut."""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from videonsa_jax.data.errors import BadSample, check_is_file

# Titles that are no UTF-8 do not matter; from 19 on, PyAV lets them pass by itself.
TOLERANT = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
# boxes of an MP4 file; others may be bytes that some program appended
MP4_BOXES = (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"sidx")
EBML, SEGMENT = 0x1A45DFA3, 0x18538067  # ids of Matroska's two outermost elements


@contextlib.contextmanager
def opened(path: str | pathlib.Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """(container, its video stream); whatever FFmpeg raises meanwhile becomes a BadSample."""
    check_is_file(path)
    try:
        # "file:", since FFmpeg takes what stands before a colon for a protocol
        with av.open(f"file:{path}", **TOLERANT) as container:
            stream = _video_stream(container)
            if stream is None:
                raise BadSample(str(path), missing_end(path) or "has no video stream")
            if stream.codec_context is None:
                raise BadSample(str(path), "this FFmpeg has no decoder for its video stream")
            stream.codec_context.thread_count = 1  # damaged frames too decode alike each time
            yield container, stream
    except (av.error.FFmpegError, UnicodeError) as error:
        reason = missing_end(path) or f"not a readable video: {getattr(error, 'strerror', error)}"
        raise BadSample(str(path), reason) from error


def packets_of(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The stream's packets from where the container is to its end."""
    with contextlib.suppress(IndexError):  # PyAV's, at the end, of a stream that appeared midway
        yield from container.demux(stream)


def whole_frames(packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
    """Decodes packets of one stream; frames flagged as corrupt are left out.

    Raises FFmpegError where a packet does not decode, and says after which time. Only in front of
    the first keyframe that may be: a recording of a broadcast begins anywhere.
    """
    last, undecoded = None, None
    for packet in packets:
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as error:
            if last is not None:
                raise _undecodable(f"what follows {last.time or 0:.2f} s", error) from error
            undecoded = error
            continue
        for frame in frames:
            if not frame.is_corrupt:
                if last is None and undecoded and not frame.key_frame:
                    raise _undecodable("its first frame", undecoded)
                last = frame
                yield frame
    if last is None and undecoded:
        raise _undecodable("all of it", undecoded)


def quarter_turns(frame: av.VideoFrame) -> int:
    """How often to turn the frame by 90 degrees, counterclockwise, to show it."""
    return round(frame.rotation / 90) % 4


def shown_size(frame: av.VideoFrame) -> tuple[int, int]:
    """(height, width) of the frame as it is shown."""
    turned = quarter_turns(frame) % 2
    return (frame.width, frame.height) if turned else (frame.height, frame.width)


def missing_end(path: str | pathlib.Path, stream: VideoStream | None = None) -> str | None:
    """Says how a file is truncated where its own structure shows it; None for all others.

    Args:
      path: MP4, Matroska and AVI name their own length.
      stream: of an MP4 file that opens; its table of samples tells more than the outer boxes do.
    """
    size = os.path.getsize(path)
    if stream is not None and stream.container.format.name.startswith("mov"):
        end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    else:
        with open(path, "rb") as file:
            end = _promised_end(file)
    return f"truncated: {size} bytes are there of {end}" if end > size else None


def has_whole_index(path: str | pathlib.Path) -> bool:
    """Whether an MP4 file's index tells of all its frames: in pieces, each has an index."""
    with open(path, "rb") as file:
        boxes = {kind for kind, _ in _mp4_boxes(file)}
    return b"moov" in boxes and b"moof" not in boxes


def _undecodable(what: str, error: av.error.FFmpegError) -> av.error.FFmpegError:
    return av.error.InvalidDataError(error.errno, f"{what} does not decode: {error.strerror}")


def _video_stream(container: InputContainer) -> VideoStream | None:
    """FFmpeg's choice; never a cover picture."""
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    if best in videos or not videos:
        return best if videos else None
    return next((s for s in videos if s.disposition & Disposition.default), videos[0])


def _promised_end(file: BinaryIO) -> int:
    """Where the file should end by its outermost structure; 0 where that does not say."""
    head = file.read(12)
    if head[4:8] in MP4_BOXES:
        return max((end for kind, end in _mp4_boxes(file) if kind in MP4_BOXES), default=0)
    if head[:4] == b"RIFF" and head[4:8] != b"\xff" * 4:
        return 8 + int.from_bytes(head[4:8], "little")
    file.seek(0)
    if _ebml_number(file, keep_marker=True) == EBML:
        header = _ebml_number(file)
        file.seek(header or 0, os.SEEK_CUR)
        if _ebml_number(file, keep_marker=True) == SEGMENT:
            length = _ebml_number(file)  # None: not known while it was written
            return 0 if length is None else file.tell() + length
    return 0


def _mp4_boxes(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(type, where it ends) of each outermost box."""
    end = 0
    while True:
        file.seek(end)
        head = file.read(16)
        size = int.from_bytes(head[:4])
        if size == 1:  # the size follows, in 64 bits
            size = int.from_bytes(head[8:16])
        if size < 8:  # 0: the last box, up to the file's end; 1 to 7: no box
            return
        end += size
        yield head[4:8], end


def _ebml_number(file: BinaryIO, *, keep_marker: bool = False) -> int | None:
    """Matroska's integers of 1 to 8 bytes; the first bit that is set tells how many."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    number = int.from_bytes(first + file.read(length - 1))
    if keep_marker:
        return number
    number -= 1 << 7 * length
    return None if number == (1 << 7 * length) - 1 else number  # all ones: not known
