"""Runs a checkpoint on arrays named as Hugging Face names them and writes its logits."""

import argparse
import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from convert.models import registry
from convert.models.family import Family
from videonsa_jax.batch import Batch
from videonsa_jax.config.schema import ComputeConfig, ModelConfig
from videonsa_jax.data import hf_inputs, pack
from videonsa_jax.errors import UserError
from videonsa_jax.model.attention_modes import ATTENTION
from videonsa_jax.training import checkpoint

Arrays = Mapping[str, np.ndarray]

# pixels, grids, what they are called, the config's placeholder
_KINDS = (
    ("pixel_values_videos", "video_grid_thw", "video_token_id"),
    ("pixel_values", "image_grid_thw", "image_token_id"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m convert logits`."""
    parser.add_argument("checkpoint", help="folder of weights, or a run's --workdir")
    parser.add_argument(
        "inputs",
        help="npz of input_ids [B T] and, where they apply, attention_mask, pixel_values_videos, "
        "video_grid_thw, second_per_grid_ts, pixel_values, image_grid_thw",
    )
    parser.add_argument(
        "out",
        help="npz to write: logits f32[B T vocabulary], 0 at padding, images and videos",
    )
    parser.add_argument(
        "--attention",
        choices=sorted(ATTENTION),
        help="default: what the checkpoint's config says",
    )


def run(args: argparse.Namespace) -> int:
    """Loads, computes, writes; returns the exit code.

    Raises:
      UserError: what the user can mend.
    """
    out = pathlib.Path(args.out)
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: its folder does not exist; make it first")
    family = registry.of_checkpoint(args.checkpoint)
    cfg = checkpoint.load_model_config(args.checkpoint, family.config_class)
    if not isinstance(cfg, ModelConfig):
        raise UserError(
            f"{args.checkpoint}: {family.name} is not configured as Qwen2.5-VL is, whose arrays "
            "this verb takes"
        )
    if args.attention is not None:
        cfg = dataclasses.replace(cfg, attention=args.attention)
    inputs = read_inputs(args.inputs, cfg)
    try:
        batch, columns = to_batch(inputs, cfg)
    except ValueError as error:
        raise UserError(f"{args.inputs}: {error}") from error
    values = compute(family, cfg, checkpoint.load_params(args.checkpoint), batch)
    logits = hf_inputs.to_columns(values, columns, inputs["input_ids"].shape[1])
    if not np.isfinite(logits).all():
        raise UserError(
            f"{args.checkpoint}: {np.count_nonzero(~np.isfinite(logits))} logits are not finite; "
            "the weights or the pixels hold extreme values"
        )
    partial = out.with_name(out.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, logits=logits)
    os.replace(partial, out)
    rows, tokens, vocabulary = logits.shape
    print(f"{out}: logits [{rows} {tokens} {vocabulary}], {cfg.attention} attention")
    return 0


def to_batch(inputs: Arrays, cfg: ModelConfig) -> tuple[Batch, Sequence[np.ndarray]]:
    """One sequence per row, in slots that just fit.

    Returns:
      The batch, and per row i32[text tokens]: the columns that its text tokens came from.

    Raises:
      ValueError: grids, pixels and placeholders disagree.
    """
    samples, columns = hf_inputs.to_samples(inputs, cfg)
    needed = np.max([pack.row_tokens([sample], cfg) for sample in samples], axis=0)
    fields = pack.pack([[sample] for sample in samples], pack.Bucket(*needed.tolist()), cfg)
    grids = [visual.grid for sample in samples for visual in sample.visuals]
    return Batch(**fields, frame_patches=pack.frame_patches(grids, cfg)), columns


def compute(family: Family, cfg: ModelConfig, params: dict[str, Any], batch: Batch) -> np.ndarray:
    """Logits f32[b s v] of the text stream, computed in float32.

    Args:
      family: whose model is run.
      cfg: what the parameters belong to; its `attention` is used.
      params: nested; any dtype, a layer is cast when it is used.
      batch: of token ids within the vocabulary.
    """
    settings = ComputeConfig(dtype="float32", remat="none")
    model = nnx.eval_shape(lambda: family.model(cfg, compute=settings, rngs=nnx.Rngs(0)))
    model = nnx.merge(nnx.split(model)[0], params)
    with jax.default_matmul_precision("highest"):  # accelerators round float32 products otherwise
        logits = jax.jit(lambda model, batch: model.logits(model(batch)[0]))(model, batch)
    return np.asarray(logits)


def read_inputs(path: str | pathlib.Path, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """The arrays of a npz file, checked against the model and each other.

    Raises:
      UserError: naming the file and the array.
    """
    try:
        inputs = np.load(path, allow_pickle=False)
        if isinstance(inputs, np.ndarray):
            raise ValueError("it holds one array without a name")
        with inputs as file:
            inputs = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: {error}; write a npz of plain arrays by numpy.savez") from error
    try:
        _check_tokens(inputs, cfg)
        for pixels, grids, token in _KINDS:
            _check_visuals(inputs, pixels, grids, getattr(cfg, token), cfg)
        _check_seconds(inputs)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return inputs


def _check_tokens(inputs: Arrays, cfg: ModelConfig) -> None:
    if "input_ids" not in inputs:
        raise ValueError(f"input_ids is missing; it holds {', '.join(inputs) or 'nothing'}")
    ids = inputs["input_ids"]
    _check(ids, "input_ids", "iu", "[B T]", ids.ndim == 2 and ids.size > 0)
    mask = inputs.get("attention_mask", np.ones_like(ids))
    _check(mask, "attention_mask", "iub", f"{list(ids.shape)}", mask.shape == ids.shape)
    if not np.isin(mask, [0, 1]).all():
        raise ValueError("attention_mask holds values other than 0 and 1")
    if not mask.any(axis=1).all():
        raise ValueError(f"attention_mask is 0 all over row {int(np.argmin(mask.any(axis=1)))}")
    kept = ids[mask.astype(bool)]
    if not ((kept >= 0) & (kept < cfg.text.vocab_size)).all():
        wrong = kept[(kept < 0) | (kept >= cfg.text.vocab_size)][0]
        raise ValueError(
            f"input_ids holds {wrong}; the vocabulary is 0 to {cfg.text.vocab_size - 1}"
        )


def _check_visuals(inputs: Arrays, pixels: str, grids: str, token: int, cfg: ModelConfig) -> None:
    ids = inputs["input_ids"]
    placeholders = int(np.count_nonzero((ids == token) & (inputs.get("attention_mask", 1) == 1)))
    for name, other in ((pixels, grids), (grids, pixels)):
        if name not in inputs and (other in inputs or placeholders):
            given = other if other in inputs else f"token {token} of input_ids"
            raise ValueError(f"{name} is missing, but {given} is given")
    if grids not in inputs:
        return
    sizes, values = inputs[grids], inputs[pixels]
    merge = cfg.vision.merge_size
    has_rows = sizes.ndim == 2 and sizes.shape[1] == 3 and len(sizes) > 0
    _check(sizes, grids, "iu", "[visuals 3]", has_rows)
    if (sizes < 1).any() or (sizes[:, 1:] % merge).any():
        raise ValueError(f"{grids}={sizes.tolist()} must be positive, rows and columns x {merge}")
    wanted = (int(sizes.prod(axis=1).sum()), cfg.vision.patch_elements)
    _check(values, pixels, "f", f"{list(wanted)}, as {grids} says", values.shape == wanted)
    if not np.isfinite(values).all():
        raise ValueError(f"{pixels} holds values that are not finite")
    if placeholders != wanted[0] // merge**2:
        raise ValueError(
            f"input_ids holds {placeholders} placeholders {token}; {grids} needs "
            f"{wanted[0] // merge**2}"
        )


def _check_seconds(inputs: Arrays) -> None:
    name, grids = "second_per_grid_ts", "video_grid_thw"
    if name not in inputs:
        return
    if grids not in inputs:
        raise ValueError(f"{grids} is missing, but {name} is given")
    seconds = inputs[name]
    _check(seconds, name, "iuf", f"[{len(inputs[grids])}]", seconds.shape == (len(inputs[grids]),))
    if not (np.isfinite(seconds) & (seconds >= 0)).all():
        raise ValueError(f"{name}={seconds.tolist()} must be finite and not below 0")


def _check(array: np.ndarray, name: str, kinds: str, shape: str, has_shape: bool) -> None:
    words = {"i": "integers", "b": "booleans", "f": "floats"}
    if array.dtype.kind not in kinds:
        wanted = " or ".join(words[kind] for kind in kinds if kind in words)
        raise ValueError(f"{name} has dtype {array.dtype}; it must hold {wanted}")
    if not has_shape:
        raise ValueError(f"{name} has shape {list(array.shape)}; it must be {shape}")
