"""Conversation -> Sample: its size from file headers, and the decoding."""

import functools
import math
from typing import NamedTuple

import numpy as np

from videonsa_jax.config.schema import DataConfig, ModelConfig, VisionConfig
from videonsa_jax.data import chat, pack, processor
from videonsa_jax.data.decoder_pool import DecoderPool
from videonsa_jax.data.errors import BadSample, about_sample
from videonsa_jax.data.sample import Sample, Visual
from videonsa_jax.data.sampling import Frames, SamplingRule
from videonsa_jax.data.sources import Conversation
from videonsa_jax.data.tokenizer import Tokenizer
from videonsa_jax.data.visuals import Outline, Reference
from videonsa_jax.errors import UserError

BOUND_ASPECT = 4.0  # frames up to this aspect ratio are within `frame_patches`


class Size(NamedTuple):
    """Tokens of one sample."""

    vision: int
    text: int


def frame_patches(data: DataConfig, model: ModelConfig) -> int:
    """The static bound on patches per frame (see `Batch`) that `data`'s pixel limits imply."""
    cfg = model.vision
    unit = cfg.patch_size * cfg.merge_size
    aspect = np.geomspace(1, BOUND_ASPECT, 1000)
    # resizing to at least min_pixels rounds both sides up, so it may exceed max_pixels
    rows = np.ceil(np.sqrt(data.min_pixels / aspect) / unit)
    columns = np.ceil(np.sqrt(data.min_pixels * aspect) / unit)
    tokens = max(data.max_pixels // unit**2, int((rows * columns).max()))
    return pack.frame_patches([(1, tokens * cfg.merge_size, cfg.merge_size)], model)


class FrameReader:
    """Samples and resizes the frames of images and videos as configured."""

    def __init__(self, data: DataConfig, cfg: VisionConfig, decoders: DecoderPool | None = None):
        """`decoders`: opens the files; None: this process does."""
        self._data, self._cfg = data, cfg
        self._decoders = decoders or DecoderPool()
        self._rule = SamplingRule(data.fps, data.min_frames, data.max_frames)
        self._limits = {
            "min_pixels": data.min_pixels,
            "max_pixels": data.max_pixels,
            "total_pixels": data.total_pixels,
        }

    def outline(self, reference: Reference) -> Outline | None:
        """How many frames of which size after resizing; None: `frame_count_range` leaves it out.

        Raises:
          BadSample: the file cannot be opened.
          ValueError: the aspect ratio is extreme.
          UserError: no decoder process starts.
        """
        outline = self._decoders.outline(reference, self._rule)
        if self._data.frame_count_range and outline.candidates is not None:
            least, most = self._data.frame_count_range
            if not least <= outline.candidates <= most:
                return None
        height, width = self.size(*outline[:3])
        return Outline(outline.frames, height, width)

    def read(self, reference: Reference) -> Frames:
        """Decodes; raises like `outline`, and BadSample where a frame does not decode."""
        fit = functools.partial(processor.resize_to_limits, cfg=self._cfg, **self._limits)
        return self._decoders.read(reference, self._rule, fit)

    def size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) that each of `frames` frames is resized to."""
        return processor.frame_size(frames, height, width, self._cfg, **self._limits)


class Loader:
    """Opens the files of conversations and makes samples of them; workers take copies of it."""

    def __init__(
        self,
        data: DataConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        decoders: DecoderPool | None = None,
    ):
        """`decoders`: opens the files; None: this process does.

        Raises:
          UserError: the tokenizer is not the model's.
        """
        _check_tokenizer(data, model, tokenizer)
        self._data, self._vision, self._tokenizer = data, model.vision, tokenizer
        self._reader = FrameReader(data, model.vision, decoders)
        self._frame_patches = frame_patches(data, model)

    def measure(self, conversation: Conversation) -> Size | None:
        """The sample's size, from headers only; None where `frame_count_range` leaves it out.

        Raises:
          BadSample: a file cannot be opened, a frame is of an extreme shape, the text's
            placeholders do not match, there is no answer to learn from, or anything else.
        """
        with about_sample(conversation.name):
            visuals = []
            for reference in conversation.visuals:
                outline = self._reader.outline(reference)
                if outline is None:
                    return None
                visuals.append(self._without_patches(reference, outline, conversation.name))
            sample = self._sample(conversation, visuals, generation_prompt=False)
            if not sample.loss_weights.any():
                raise BadSample(conversation.name, _nothing_to_learn(conversation))
            vision = sum(processor.merged_tokens(visual.grid, self._vision) for visual in visuals)
            return Size(vision, len(sample.tokens) - vision)

    def load(self, conversation: Conversation, *, generation_prompt: bool = False) -> Sample:
        """Decodes and tokenizes.

        Args:
          conversation: from a source.
          generation_prompt: end with the opening of an assistant turn, for the model to continue.

        Raises:
          BadSample: a file is missing, truncated or unreadable, placeholders do not match, or
            anything else.
        """
        with about_sample(conversation.name):
            visuals = []
            for reference in conversation.visuals:
                frames = self._reader.read(reference)
                visuals.append(
                    processor.visual_from_resized(frames, self._vision, is_video=reference.is_video)
                )
            return self._sample(conversation, visuals, generation_prompt=generation_prompt)

    def _without_patches(self, reference: Reference, outline: Outline, name: str) -> Visual:
        grid = processor.grid_of(*outline[:3], self._vision)
        if math.prod(grid[1:]) > self._frame_patches:
            raise BadSample(
                name,
                f"a frame of {outline.width}x{outline.height} pixels has {math.prod(grid[1:])} "
                f"patches, above the {self._frame_patches} that data.max_pixels="
                f"{self._data.max_pixels} and aspect ratios up to {BOUND_ASPECT:g} allow",
            )
        return Visual(np.zeros((0, 0), np.float32), grid, reference.is_video)

    def _sample(self, conversation, visuals, *, generation_prompt: bool) -> Sample:
        return chat.to_sample(
            conversation.messages,
            visuals,
            self._tokenizer,
            self._vision,
            generation_prompt=generation_prompt,
        )


def _nothing_to_learn(conversation: Conversation) -> str:
    if any(message.role == "assistant" for message in conversation.messages):
        return 'no assistant turn bears loss ("loss": false), so there is nothing to learn'
    return "has no assistant turn, so nothing to learn"


def _check_tokenizer(data: DataConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
    found = {
        "image_token_id": tokenizer.image_pad,
        "video_token_id": tokenizer.video_pad,
        "vision_start_token_id": tokenizer.vision_start,
    }
    for name, token in found.items():
        if getattr(model, name) != token:
            raise UserError(
                f"model.{name}={getattr(model, name)}, but the tokenizer of "
                f"data.tokenizer={data.tokenizer} has {token}; set model.{name}={token}"
            )
    if tokenizer.vocab_size > model.text.vocab_size:
        raise UserError(
            f"data.tokenizer={data.tokenizer} has {tokenizer.vocab_size} tokens, more than "
            f"model.text.vocab_size={model.text.vocab_size}"
        )
