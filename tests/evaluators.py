"""A tiny model with random weights, large enough to matter, and real videos to ask it about."""

import dataclasses
import pathlib

from tests import small_models
from videonsa_jax.config import schema as config
from videonsa_jax.config.schema import DataConfig, EvalConfig, ModelConfig, NSAConfig
from videonsa_jax.data import needle
from videonsa_jax.data.tokenizer import Tokenizer, train_bpe
from videonsa_jax.evaluation.runner import Evaluator

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
        text=dataclasses.replace(
            tiny.text, vocab_size=288, d_model=64, d_ff=96, tie_embeddings=False
        ),
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
        decode_timeout_s=0,  # no decoder processes: they take a while to start
    )


def build(folder: pathlib.Path, questions: pathlib.Path) -> Evaluator:
    """An evaluator in float32; its tokenizer is written to `folder`."""
    tokenizer = write_tokenizer(folder)
    cfg = model_config(tokenizer)
    return Evaluator(
        model=small_models.build(cfg, small_models.random_params(cfg, seed=0)),
        tokenizer=tokenizer,
        data=data_config(questions, folder),
        cfg=EvalConfig(batch=4, max_new_tokens=4),
    )


def write_config(path: pathlib.Path, evaluator: Evaluator) -> pathlib.Path:
    """A config file of the evaluator's model, data and evaluation."""
    sections = {
        "model": dataclasses.asdict(evaluator.model.cfg),
        "compute": dataclasses.asdict(evaluator.model.compute),
        "data": dataclasses.asdict(evaluator.data),
        "eval": dataclasses.asdict(evaluator.cfg) | {"tasks": {"needle": evaluator.data.source[0]}},
        "optim": {},
        "train": {"steps": 1},
    }
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({sections!r})\n"
    )
    return path
