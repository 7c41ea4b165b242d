"""A tiny model with random weights, and real videos with questions to ask it."""

import dataclasses
import pathlib

from flax import nnx

from videonsa_jax import config
from videonsa_jax.config import ComputeConfig, DataConfig, EvalConfig, ModelConfig, NSAConfig
from videonsa_jax.data import needle
from videonsa_jax.data.tokenizer import Tokenizer, train_bpe
from videonsa_jax.evaluation.runner import Examiner
from videonsa_jax.model import VideoNSA

CLIPS = needle.NeedleConfig(kind="first", seconds=2.0, fps=8, pixels=56, event_seconds=0.25)
VISION_TOKENS = 32  # 8 frame pairs of 4 tokens


def write_clips(folder: pathlib.Path, count: int) -> pathlib.Path:
    """Writes videos and returns their file of questions."""
    return needle.write_dataset(folder, CLIPS, {"heldout": count})["heldout"]


def write_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """Bytes and special tokens only."""
    return train_bpe(["a"], 270, folder)


def model_config(tokenizer: Tokenizer) -> ModelConfig:
    """Two layers, sparse from the first block on."""
    tiny = config.PRESETS["tiny"]
    return dataclasses.replace(
        tiny,
        text=dataclasses.replace(tiny.text, vocab_size=288, d_model=64, d_ff=96, head_dim=32),
        nsa=NSAConfig(block_size=4, block_count=2, window_size=6),
        image_token_id=tokenizer.image_pad,
        video_token_id=tokenizer.video_pad,
        vision_start_token_id=tokenizer.vision_start,
    )


def data_config(questions: pathlib.Path, tokenizer: pathlib.Path) -> DataConfig:
    """Every frame of `CLIPS`; one token takes up to four bytes of text, so text is long."""
    return DataConfig(
        source=(str(questions),),
        tokenizer=str(tokenizer),
        fps=8.0,
        min_pixels=56 * 56,
        max_pixels=56 * 56,
        buckets=((VISION_TOKENS, 320), (2 * VISION_TOKENS, 320)),
        threads=2,
    )


def build(folder: pathlib.Path, questions: pathlib.Path) -> Examiner:
    """An examiner in float32; its tokenizer is written to `folder`."""
    tokenizer = write_tokenizer(folder)
    compute = ComputeConfig(dtype="float32", remat="none")
    return Examiner(
        model=VideoNSA(model_config(tokenizer), compute=compute, rngs=nnx.Rngs(0)),
        tokenizer=tokenizer,
        data=data_config(questions, folder),
        cfg=EvalConfig(batch=4, max_new_tokens=4),
    )
