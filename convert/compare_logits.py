"""One prompt through transformers and through this model: do the logits agree?

The only module that needs PyTorch; it imports it when it is used.
"""

import dataclasses
import importlib.metadata
import importlib.util
import pathlib
from typing import Any

import numpy as np

from convert import logits
from convert.hf.directory import HFDirectory
from videonsa_jax.config.schema import ModelConfig
from videonsa_jax.data import hf_inputs, positions
from videonsa_jax.errors import UserError
from videonsa_jax.training import checkpoint

RELATIVE_LIMIT = 1e-4  # of the largest logit; both sides compute in float32


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two sets of logits differ over the text tokens of a prompt."""

    tokens: int
    largest: float  # difference, relative to the largest logit
    divergence: float  # mean KL(theirs || ours) in nats
    top1: float  # share of tokens with the same most probable successor

    @property
    def is_close(self) -> bool:
        """Whether rounding explains the difference."""
        return self.largest <= RELATIVE_LIMIT  # false for NaN


def missing_packages() -> list[str]:
    """What would have to be installed to compare logits."""
    return [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]


def transformers_version() -> str:
    """Of the installed package."""
    return importlib.metadata.version("transformers")


def as_transformers(cfg: ModelConfig) -> ModelConfig:
    """The model that transformers computes: dense attention, its version's positions."""
    advance = "spatial" if _is_version_5() else "all_axes"
    return dataclasses.replace(cfg, attention="dense", position_advance=advance)


def compare(
    hf: HFDirectory, folder: str | pathlib.Path, cfg: ModelConfig, *, rounded: str | None
) -> Agreement:
    """Runs both models, one after the other, so that only one is in memory.

    Args:
      hf: folder that transformers loads, of a family that it has a class for.
      folder: of the checkpoint.
      cfg: of the checkpoint.
      rounded: a dtype that transformers' weights are rounded to first, because the conversion
        rounded the checkpoint's.

    Raises:
      UserError: transformers does not find all its tensors in `hf`.
    """
    cfg = as_transformers(cfg)
    inputs = prompt(cfg)
    theirs = _transformers_logits(hf, inputs, cfg, rounded)
    batch, columns = logits.to_batch(inputs, cfg)
    values = logits.compute(hf.family, cfg, checkpoint.load_params(folder), batch)
    ours = hf_inputs.to_columns(values, columns, theirs.shape[1])
    text = ~positions.is_vision_token(inputs["input_ids"], cfg)
    return agreement(theirs[text], ours[text])


def agreement(theirs: np.ndarray, ours: np.ndarray) -> Agreement:
    """Compares logits f32[tokens vocabulary], in float64."""
    theirs, ours = theirs.astype(np.float64), ours.astype(np.float64)
    log_p, log_q = _log_softmax(theirs), _log_softmax(ours)
    return Agreement(
        tokens=len(theirs),
        largest=float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
        divergence=float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()),
        top1=float((theirs.argmax(axis=-1) == ours.argmax(axis=-1)).mean()),
    )


def prompt(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Text, a video of random pixels, text; the same every time for the same sizes."""
    rng = np.random.default_rng(0)
    merge = cfg.vision.merge_size
    grid = (3, 3 * merge, 5 * merge)  # its windows are whole ones and cut ones
    special = [cfg.image_token_id, cfg.video_token_id, cfg.vision_start_token_id]
    words = np.setdiff1d(np.arange(cfg.text.vocab_size), special)
    video = np.full(3 * 3 * 5, cfg.video_token_id)
    parts = [rng.choice(words, 12), [cfg.vision_start_token_id], video, rng.choice(words, 16)]
    pixels = rng.standard_normal((int(np.prod(grid)), cfg.vision.patch_elements))
    return {
        "input_ids": np.concatenate(parts)[None].astype(np.int64),
        "attention_mask": np.ones((1, sum(map(len, parts))), np.int64),
        "pixel_values_videos": pixels.astype(np.float32),
        "video_grid_thw": np.array([grid]),
        "second_per_grid_ts": np.array([1.5], np.float32),
    }


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _is_version_5() -> bool:
    return int(transformers_version().partition(".")[0]) >= 5


def _transformers_logits(
    hf: HFDirectory, inputs: dict[str, np.ndarray], cfg: ModelConfig, rounded: str | None
) -> np.ndarray:
    import torch

    model = _transformers_model(hf)
    if rounded is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, rounded)).to(torch.float32)
    arrays: dict[str, Any] = dict(inputs)
    if _is_version_5():  # without token types, it would count all positions as text
        arrays["mm_token_type_ids"] = 2 * (inputs["input_ids"] == cfg.video_token_id)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}
        return model(**tensors).logits.numpy()


def _transformers_model(hf: HFDirectory) -> Any:
    """Loaded in its own dtype, computing in float32, eager; without gates."""
    import transformers

    logger = transformers.utils.logging
    verbosity = logger.get_verbosity()
    logger.set_verbosity_error()  # it lists tensors that it does not know
    try:
        model, info = getattr(transformers, hf.family.transformers_class).from_pretrained(
            str(hf.path),
            local_files_only=True,
            attn_implementation="eager",
            output_loading_info=True,
            **{"dtype" if _is_version_5() else "torch_dtype": "auto"},
        )
    finally:
        logger.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise UserError(f"{hf.path}: transformers does not find {sorted(info['missing_keys'])[:3]}")
    return model.float().eval()
