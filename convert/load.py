"""A Hugging Face folder straight onto a mesh, without a checkpoint in between."""

import pathlib
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import traverse_util

from convert.hf import directory
from convert.models.family import Config
from convert.weights import weight_match
from convert.weights.layout import Param
from convert.weights.weight_match import Match
from videonsa_jax.errors import UserError


def is_hf(path: str | pathlib.Path) -> bool:
    """Whether a folder is one of Hugging Face's; a checkpoint has no config at its top."""
    names = (directory.CONFIG, directory.ADAPTER_CONFIG)
    return any((pathlib.Path(path) / name).is_file() for name in names)


def load_hf(
    path: str | pathlib.Path, cfg: Config, abstract: dict[str, Any], *, seed: int = 0
) -> dict[str, Any]:
    """Reads what this process's devices hold, and nothing else.

    Args:
      path: folder with config.json and safetensors.
      cfg: the model; what a run may choose, like the mode of attention, need not be the folder's.
      abstract: nested `jax.ShapeDtypeStruct`s with shardings, of all parameters.
      seed: of what the folder lacks, for example the gates of stock Qwen2.5-VL.

    Returns:
      Arrays as `abstract` describes them, nested alike; without adapters, which no folder has.

    Raises:
      UserError: the folder's config or tensors are not those of `cfg`.
    """
    source = directory.open_hf(path)
    differ = source.differing_fields(cfg)
    free = (*source.family.free_fields, "lora.")
    wrong = [line for name, line in differ.items() if not name.startswith(free)]
    if wrong:
        raise UserError(
            f"model.{'; model.'.join(wrong[:3])}{f'; and {len(wrong) - 3} more' * (len(wrong) > 3)}"
            "; set them as the folder's config.json does, or choose its preset"
        )
    report = logging.warning if jax.process_index() == 0 else logging.info
    found = weight_match.match(source, cfg, seed=seed, report=report)
    wanted = traverse_util.flatten_dict(abstract, sep="/")
    loaded = {}
    for param in found.params:
        if param.row.jax not in wanted or wanted[param.row.jax].shape != param.shape:
            here = wanted[param.row.jax].shape if param.row.jax in wanted else "missing"
            raise UserError(
                f"{path}: parameter {param.row.jax} is {param.shape} there, {here} in the model "
                "that is loaded; use the folder's own config"
            )
        loaded[param.row.jax] = _place(found, param, wanted[param.row.jax])
    return traverse_util.unflatten_dict(loaded, sep="/")


def _place(found: Match, param: Param, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    tensors = [found.tensors[name] for name in param.row.names()]

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if param.row.layers is None:
            return param.row.op.to_jax(tensors[0].map())[index].astype(abstract.dtype)
        chosen = tensors[index[0]]
        shape = [len(range(*s.indices(n))) for s, n in zip(index[1:], param.inner, strict=True)]
        out = np.empty((len(chosen), *shape), abstract.dtype)
        for layer, tensor in zip(out, chosen, strict=True):  # one map at a time
            layer[...] = param.row.op.to_jax(tensor.map())[index[1:]]
        return out

    return jax.make_array_from_callback(param.shape, abstract.sharding, part)
