"""Prepared datasets: videos sampled, resized and stored once (TFDS, ArrayRecord, no TensorFlow)."""

import contextlib
import errno
import io
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Literal

import grain
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from videonsa_jax.config.schema import DataConfig, VisionConfig
from videonsa_jax.data.bad_samples import BadSampleLog, lost_files
from videonsa_jax.data.chat import Message
from videonsa_jax.data.decoder_pool import DecoderPool
from videonsa_jax.data.errors import BadSample, about_sample
from videonsa_jax.data.load import FrameReader
from videonsa_jax.data.sources import Conversation, Source
from videonsa_jax.data.visuals import Encoded
from videonsa_jax.errors import UserError

ImageFormat = Literal["jpeg", "png"]
JPEG_QUALITY = 95


class VideoChat(tfds.core.GeneratorBasedBuilder):
    """Conversations with the frames of their visuals as image files."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, examples: Callable[[], Iterator[tuple[int, dict]]], data_dir: str):
        self._examples = examples
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        return tfds.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {
                    "record": features.Text(),  # JSON: name, messages, and of each visual its
                    # frame count, sampled frames per second, and whether it is a video
                    "images": features.Sequence(features.Text()),  # bytes, all visuals' frames
                    "seconds": features.Sequence(np.float32),  # when each is shown
                }
            ),
        )

    def _split_generators(self, dl_manager) -> dict:
        del dl_manager  # nothing is downloaded
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        return self._examples()


def prepare(
    source: Source,
    data: DataConfig,
    cfg: VisionConfig,
    out: str | pathlib.Path,
    *,
    image_format: ImageFormat = "jpeg",
) -> dict[str, int]:
    """Writes a prepared dataset; data.source=("tfds:OUT",) reads it.

    Args:
      source: conversations.
      data: sampling rule, pixel limits, `frame_count_range`, threads; the rest is not used.
      cfg: patch geometry, which sizes are rounded to.
      out: a new folder; it also gets bad_samples.jsonl.
      image_format: jpeg (quality 95), or png, which loses nothing.

    Returns:
      How many conversations were "seen", "bad", and "kept"; the rest was filtered out.

    Raises:
      UserError: `out` holds a prepared dataset already, or too many samples are bad.
      OSError: the disk is full, or another error of the file system.
    """
    if next(pathlib.Path(out).glob("video_chat/*/dataset_info.json"), None):
        raise UserError(f"{out}: holds a prepared dataset already; choose another folder")
    bad_samples = pathlib.Path(out) / "bad_samples.jsonl"
    bad_log = BadSampleLog(bad_samples, data.max_bad_fraction, records=len(source))
    decoders = DecoderPool(data.threads, data.decode_timeout_s, lost_files(bad_samples))
    reader, kept = FrameReader(data, cfg, decoders), 0

    def encode(index: int) -> dict | BadSample | None:
        try:
            conversation = source[index]
            with about_sample(conversation.name):
                return _encode(conversation, reader, image_format)
        except BadSample as bad:
            return bad

    def examples() -> Iterator[tuple[int, dict]]:
        nonlocal kept
        reading = grain.ReadOptions(data.threads, prefetch_buffer_size=2 * data.threads)
        encoded = grain.MapDataset.range(len(source)).map(encode)
        for index, example in enumerate(encoded.to_iter_dataset(reading, allow_nones=True)):
            is_bad = isinstance(example, BadSample)
            bad_log.add(1, [example] if is_bad else [])
            if example is not None and not is_bad:
                kept += 1
                yield index, example
        if not kept:
            raise UserError(f"none of {len(source)} samples is left to store in {out}")

    with decoders, _full_disk(out):
        VideoChat(examples, str(out)).download_and_prepare()
    return {"seen": bad_log.seen, "bad": bad_log.bad, "kept": kept}


@contextlib.contextmanager
def _full_disk(out: str | pathlib.Path) -> Iterator[None]:
    """ArrayRecord tells of a full disk by a RuntimeError; raises OSError."""
    full = os.strerror(errno.ENOSPC)
    try:
        yield
    except RuntimeError as error:
        if full not in str(error):
            raise
        raise OSError(errno.ENOSPC, full, str(out)) from error


class PreparedSource:
    """Random access to what `prepare` wrote."""

    def __init__(self, directory: str | pathlib.Path):
        """Raises UserError: there is no prepared dataset."""
        found = sorted(pathlib.Path(directory).glob("video_chat/*/dataset_info.json"))
        if not found:
            raise UserError(
                f"{directory}: no prepared dataset; make one with {__package__}.prepare"
            )
        self._directory = directory
        self._examples = tfds.builder_from_directory(found[-1].parent).as_data_source(split="train")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Conversation:
        example = self._examples[index]
        record = json.loads(example["record"])
        images, seconds = iter(example["images"]), iter(example["seconds"])
        visuals = tuple(
            Encoded(
                name=f"{self._directory}[{index}]",
                images=tuple(itertools.islice(images, visual["frames"])),
                seconds=tuple(itertools.islice(seconds, visual["frames"])),
                sampled_fps=visual["sampled_fps"],
                is_video=visual["is_video"],
            )
            for visual in record["visuals"]
        )
        messages = tuple(Message(*fields) for fields in record["messages"])
        return Conversation(record["name"], messages, visuals)


def _encode(
    conversation: Conversation, reader: FrameReader, image_format: ImageFormat
) -> dict | None:
    """An example of `VideoChat`; None where `frame_count_range` leaves it out."""
    images, seconds, visuals = [], [], []
    for reference in conversation.visuals:
        if reader.outline(reference) is None:
            return None
        frames = reader.read(reference)
        images += [_image_bytes(image, image_format) for image in frames.images]
        seconds += frames.seconds.tolist()
        visuals.append(
            {
                "frames": len(frames.images),
                "sampled_fps": frames.sampled_fps,
                "is_video": reference.is_video,
            }
        )
    messages = [[m.role, m.text, m.bears_loss] for m in conversation.messages]
    record = {"name": conversation.name, "messages": messages, "visuals": visuals}
    return {
        "record": json.dumps(record),
        "images": images,
        "seconds": np.array(seconds, np.float32),
    }


def _image_bytes(image: np.ndarray, image_format: ImageFormat) -> bytes:
    file = io.BytesIO()
    options = {"quality": JPEG_QUALITY} if image_format == "jpeg" else {}
    Image.fromarray(image).save(file, format=image_format, **options)
    return file.getvalue()
