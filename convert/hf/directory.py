"""A folder as Hugging Face lays it out: config.json, weights in one or many files, tokenizer."""

import dataclasses
import json
import pathlib
from typing import Any

from convert.hf.safetensors import Stored, read_header
from convert.models import registry
from convert.models.family import Config, Family
from convert.store import manifest
from convert.weights import names
from videonsa_jax.config import parse
from videonsa_jax.errors import UserError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"  # of PEFT
ADAPTER = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CARRIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
LICENCES = ("LICENSE", "NOTICE")


@dataclasses.dataclass(frozen=True)
class HFDirectory:
    """What a checked folder holds; no tensor is read yet."""

    path: pathlib.Path
    config: dict[str, Any]  # of config.json
    tensors: dict[str, Stored]  # by canonical name
    carried: tuple[pathlib.Path, ...]  # config, tokenizer, processor, chat template, licence
    base: pathlib.Path | None = None  # that an adapter, which `path` then is, was merged into

    @property
    def family(self) -> Family:
        """That the config is of.

        Raises:
          UserError: it is not known.
        """
        return registry.of_config(self.config)

    def differing_fields(self, cfg: Config) -> dict[str, str]:
        """{field of a model's config: what it is there and here}, where the two differ.

        Raises:
          UserError: `config` is not understood, or of a family with another class of config.
        """
        family = self.family
        if not isinstance(cfg, family.config_class):
            raise UserError(f"{self.path} is of the family {family.name}, which is another model")
        ours = parse.flatten(cfg)
        theirs = parse.flatten(family.read_config(self.config, cfg.attention))
        return {
            name: f"{name} is {value!r}, {theirs[name]!r} in {self.path}"
            for name, value in ours.items()
            if value != theirs[name]
        }


def open_hf(path: str | pathlib.Path) -> HFDirectory:
    """Reads the config and the headers of the weights.

    Raises:
      UserError: no such folder, no config, no weights or pickled ones, a missing or damaged file,
        an index that disagrees with its files.
    """
    path = pathlib.Path(path)
    if is_adapter(path):
        raise UserError(
            f"{path} is an adapter, not a whole model; from-hf and verify merge it into the model "
            "that --base=HF_DIR names"
        )
    config = read_config(path)
    has_index, has_weights = (path / INDEX).is_file(), (path / WEIGHTS).is_file()
    if (path / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{path} holds both a whole model and {ADAPTER_CONFIG}; remove the latter if the "
            "adapter is merged already, else keep them in two folders"
        )
    if has_index and has_weights:
        raise UserError(
            f"{path} holds both {WEIGHTS} and {INDEX}; remove the one that is not this model's"
        )
    if has_index:
        stored = _read_shards(path)
    elif has_weights:
        stored = read_header(path / WEIGHTS)
    else:
        raise UserError(_no_weights(path))
    return HFDirectory(path, config, _by_canonical_name(path, config, stored), carried_files(path))


def read_config(path: str | pathlib.Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
      UserError: there is no such folder or file, or it is not a JSON object.
    """
    path = pathlib.Path(path)
    if path.is_file():
        hint = _pickle_hint(path) if path.suffix in PICKLES else "name its folder"
        raise UserError(f"{path} is a file; {hint}")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: no {CONFIG} in it; name a folder as Hugging Face lays it out")
    return read_json(path / CONFIG)


def is_adapter(path: pathlib.Path) -> bool:
    """Whether a folder holds an adapter of PEFT instead of a model."""
    whole = any((path / name).is_file() for name in (WEIGHTS, INDEX))
    return (path / ADAPTER_CONFIG).is_file() and not whole


def read_adapter(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of an adapter, by the names they have there.

    Raises:
      UserError: there are none, or pickled ones, or the file is damaged.
    """
    if not (path / ADAPTER).is_file():
        pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
        hint = _pickle_hint(pickles[0]) if pickles else f"no {ADAPTER} in it; download it"
        raise UserError(f"{path}: {hint}")
    return read_header(path / ADAPTER)


def carried_files(path: str | pathlib.Path) -> tuple[pathlib.Path, ...]:
    """The files that belong to a model beside its weights, `config.json` among them."""
    return tuple(
        file
        for file in sorted(pathlib.Path(path).iterdir())
        if file.is_file()
        and file.name not in (INDEX, manifest.FILE)  # these describe the tensors
        and (file.suffix in CARRIED or file.name.startswith(LICENCES))
    )


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object whose names differ.

    Raises:
      UserError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(file.read_text("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, not {type(value).__name__}")
    return value


def _read_shards(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of all files that the index names, each in the file that it names."""
    index = path / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map of tensors and their files; download it again")
    found: dict[str, Stored] = {}
    for file in _shard_files(index, weight_map):
        tensors = read_header(path / file)
        for name, tensor in tensors.items():
            if name not in weight_map:
                raise UserError(
                    f"{path / file}: tensor {name!r} is not in {INDEX}; download both again"
                )
            if name in found:
                raise UserError(
                    f"tensor {name!r} is in {found[name].file} and in {path / file}; expected it "
                    f"only in {weight_map[name]}"
                )
            found[name] = tensor
    for name, file in weight_map.items():
        if name not in found or found[name].file.name != file:
            raise UserError(
                f"{path / file}: no tensor {name!r}, which {INDEX} expects in it; download both "
                "again"
            )
    return found


def _shard_files(index: pathlib.Path, weight_map: dict[str, Any]) -> list[str]:
    tensor_of: dict[str, str] = {}  # one tensor of each file, for messages
    for name, file in weight_map.items():
        if not isinstance(file, str) or pathlib.Path(file).name != file:
            raise UserError(f"{index}: tensor {name!r} is in {file!r}, expected a file's name")
        tensor_of.setdefault(file, name)
    for file, name in tensor_of.items():
        if pathlib.Path(file).suffix in PICKLES:
            raise UserError(f"{index} names {file}; {_pickle_hint(file)}")
        if not (index.parent / file).is_file():
            raise UserError(
                f"{index.parent / file} is missing; {INDEX} expects tensor {name!r} in it; "
                "download it"
            )
    return sorted(tensor_of)


def _by_canonical_name(
    path: pathlib.Path, config: dict[str, Any], stored: dict[str, Stored]
) -> dict[str, Stored]:
    """Names of a folder of an unknown family stay as they are: it can be inspected."""
    family = registry.find(config)
    try:
        given = names.canonical_names(stored, () if family is None else family.prefixes)
    except ValueError as error:
        raise UserError(f"{path}: {error}; remove one of them") from error
    return {name: stored[as_given] for name, as_given in given.items()}


def _no_weights(path: pathlib.Path) -> str:
    if pickles := sorted(file for file in path.iterdir() if file.suffix in PICKLES):
        return f"{path}: {_pickle_hint(pickles[0])}"
    if found := sorted(file.name for file in path.glob("*.safetensors")):
        return f"{path}: {found[0]} has no {INDEX} beside it; download the index too"
    return f"{path}: neither {WEIGHTS} nor {INDEX} in it; download the weights"


def _pickle_hint(file: str | pathlib.Path) -> str:
    return (
        f"{pathlib.Path(file).name} is a pickle; pickles can run any code when they are loaded, "
        "so they are refused; load the model with transformers and save_pretrained() writes "
        "safetensors"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is named twice")
        found[name] = value
    return found
