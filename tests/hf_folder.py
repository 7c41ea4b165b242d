"""Small folders as Hugging Face lays them out, made without PyTorch."""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from convert.models import registry
from convert.weights import names
from convert.weights.table import Row
from tests import small_models
from videonsa_jax.config.schema import ModelConfig

INDEX = "model.safetensors.index.json"


def write(
    folder: pathlib.Path,
    cfg: ModelConfig,
    *,
    gates: bool = False,
    seed: int = 0,
    files: int = 1,
    dtype: np.dtype | str = "float32",
) -> dict[str, np.ndarray]:
    """A random model, spread over some files, with a config and a tokenizer file.

    Returns:
      What it wrote, by canonical name.
    """
    params = small_models.random_params(cfg, seed)
    leaves = jax.tree.leaves_with_path(params)
    flat = {"/".join(x.key for x in path): np.asarray(leaf) for path, leaf in leaves}
    family = registry.FAMILIES["videonsa" if gates else "qwen2_5_vl"]
    flat = {row.jax: flat[row.jax].astype(dtype) for row in family.rows(cfg)}
    tensors = to_torch(flat, family.rows(cfg))
    folder.mkdir()
    config = family.write_config(cfg, dtype=np.dtype(dtype).name)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"model": {}}')
    write_tensors(folder, tensors, files=files)
    return tensors


def to_torch(params: Mapping[str, np.ndarray], rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Parameters by path -> the tensors of a table's rows by canonical name, contiguous."""
    return {
        name: np.ascontiguousarray(row.op.to_torch(part))
        for row in rows
        for name, part in zip(
            row.names(), params[row.jax] if row.layers else [params[row.jax]], strict=True
        )
    }


def to_jax(tensors: Mapping[str, np.ndarray], rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The inverse of `to_torch`."""
    parts = {row: [row.op.to_jax(tensors[name]) for name in row.names()] for row in rows}
    return {row.jax: np.stack(x) if row.layers else x[0] for row, x in parts.items()}


def write_tensors(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], *, files: int) -> None:
    """One file, or several and their index."""
    if files == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for at in range(files):
        file = f"model-{at + 1:05}-of-{files:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[at::files]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}}
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": weight_map}))


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a folder by the names they have there, read by the safetensors library."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def rename(folder: pathlib.Path) -> None:
    """Spells the tensors of a one-file folder as state dicts of transformers do."""
    hub = (("visual.", "model.visual."), ("model.", "model.language_model."))
    tensors = {names.canonical(name, hub): x for name, x in read_tensors(folder).items()}
    write_tensors(folder, tensors, files=1)


def digest(folder: pathlib.Path) -> dict[str, str]:
    """{file: hash of its bytes}."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
