"""LoRA adapters as PEFT saves them: merged into their base while it is read.

A merged weight is W + scale B A, computed in float32 and rounded once to the dtype of W.
"""

import dataclasses
import math
import pathlib
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convert.hf import directory
from convert.hf.directory import ADAPTER_CONFIG, HFDirectory
from convert.hf.safetensors import Spec, Stored
from convert.weights import names
from convert.weights.weight_match import FLOATS
from videonsa_jax.errors import UserError

_ROWS = 1024  # merged at once, the same ones however a tensor is cut: the same bits
_PREFIX = "base_model.model."
_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_HARMLESS = {  # of training, or of where the tensors are, which their names say
    *("auto_mapping", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform"),
    *("ensure_weight_tying", "eva_config", "loftq_config", "lora_dropout", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
}
_NEUTRAL = (None, False, "none", {}, [])  # values of any other field
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # leave the base as it is
_MERGE = "merge the adapter with PEFT's merge_and_unload() and save_pretrained()"
_NAMES = "must be a list of names"
_PATTERN = "must have regular expressions and positive numbers"


@dataclasses.dataclass(frozen=True)
class Merged(Spec):
    """A tensor of the base with its adapter's change; nothing of the base is in memory."""

    base: Stored
    inputs: np.ndarray  # A, float32 [rank inputs]
    outputs: np.ndarray  # B, float32 [outputs rank]
    scale: float

    @property
    def file(self) -> pathlib.Path:
        """Of the base's tensor."""
        return self.base.file

    def read(self, rows: slice | None = None) -> np.ndarray:
        """The merged tensor, or those of its rows."""
        first, last, _ = (slice(None) if rows is None else rows).indices(self.shape[0])
        out = self.base.read(slice(first, last))
        for start in range(first - first % _ROWS, last, _ROWS):
            change = self.scale * (self.outputs[start : start + _ROWS] @ self.inputs)
            top, end = max(start, first), min(start + _ROWS, last)
            part = out[top - first : end - first]
            part[...] = part.astype(np.float32) + change[top - start : end - start]
        return out

    map = read


@dataclasses.dataclass(frozen=True)
class Replaced(Spec):
    """A tensor that the adapter's folder holds whole (`modules_to_save`), in the base's dtype."""

    stored: Stored

    @property
    def file(self) -> pathlib.Path:
        """Of the adapter's tensor."""
        return self.stored.file

    def read(self, rows: slice | None = None) -> np.ndarray:
        """The tensor, or those of its rows."""
        return self.stored.read(rows).astype(self.dtype, copy=False)

    map = read


def open_hf(
    path: str | pathlib.Path,
    base: str | pathlib.Path | None = None,
    *,
    report: Callable[[str], None],
) -> HFDirectory:
    """A folder of a model, or of an adapter as if it had been merged into its base.

    Args:
      path: of either.
      base: folder of the adapter's base; default: the one that its config names.
      report: called with a line for what was merged, and one for what was not.

    Raises:
      UserError: see `directory.open_hf`; no base is there, or merging it is not understood.
    """
    path = pathlib.Path(path)
    if not directory.is_adapter(path):
        if base is not None:
            raise UserError(f"--base={base} is for an adapter, but {path} has no {ADAPTER_CONFIG}")
        return directory.open_hf(path)
    config = directory.read_json(path / ADAPTER_CONFIG)
    _refuse_unknown(path, config)
    source = directory.open_hf(_base_folder(path, config, base))
    merged = _merge(path, config, source, directory.read_adapter(path))
    report(f"{path} is an adapter: {len(merged)} tensors of {source.path} change")
    if unchanged := _unchanged(config, source, merged):
        report(
            f"{len(unchanged)} others that {ADAPTER_CONFIG} names have no LoRA and stay as they "
            f"are, for example {unchanged[0]}"
        )
    return dataclasses.replace(source, path=path, tensors=source.tensors | merged, base=source.path)


def _refuse_unknown(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Whatever would change how the tensors are merged."""
    start, base = (config.get(key) for key in ("init_lora_weights", "base_model_name_or_path"))
    rules = {
        "peft_type": (config.get("peft_type") == "LORA", "is not supported; allowed: 'LORA'"),
        "init_lora_weights": (start in _PLAIN_STARTS, f"changed the base too; {_MERGE}"),
        "base_model_name_or_path": (isinstance(base or "", str), "must be a name"),
        "r": (_is_positive(config.get("r"), int), "must be a positive integer"),
        "lora_alpha": (_is_positive(config.get("lora_alpha")), "must be a positive number"),
        "target_modules": (isinstance(config.get("target_modules"), list | str), _NAMES),
        "modules_to_save": (isinstance(config.get("modules_to_save") or [], list), _NAMES),
        **{key: (_is_pattern(config.get(key) or {}), _PATTERN) for key in _PATTERNS},
    }
    others = config.keys() - rules.keys() - _HARMLESS - {"use_rslora"}
    rules |= {key: (config[key] in _NEUTRAL, f"is not supported; {_MERGE}") for key in others}
    for key, (holds, why) in rules.items():
        if not holds:
            raise UserError(f"{path / ADAPTER_CONFIG}: {key}={config.get(key)!r} {why}")


def _is_positive(value: Any, kind: type | types.UnionType = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


def _is_pattern(value: Any) -> bool:
    try:
        return all(re.compile(key) and _is_positive(x) for key, x in value.items())
    except (AttributeError, re.error):
        return False


def _base_folder(
    path: pathlib.Path, config: Mapping[str, Any], given: str | pathlib.Path | None
) -> pathlib.Path:
    name = config.get("base_model_name_or_path")
    if given is not None:
        return pathlib.Path(given)
    if not name or not (pathlib.Path(name) / directory.CONFIG).is_file():
        raise UserError(
            f"{path} is a LoRA adapter of {name or 'an unnamed model'}, which is no folder of a "
            "model here; download that model and name its folder with --base=HF_DIR"
        )
    return pathlib.Path(name)


def _merge(
    path: pathlib.Path,
    config: Mapping[str, Any],
    source: HFDirectory,
    tensors: Mapping[str, Stored],
) -> dict[str, Merged | Replaced]:
    """What the adapter changes, by canonical name; every one of its tensors is used."""
    halves: dict[str, dict[str, Stored]] = {}
    merged: dict[str, Merged | Replaced] = {}
    for name, tensor in tensors.items():
        given = name.removeprefix(_PREFIX).replace(".modules_to_save.default.", ".")
        if half := _HALF.fullmatch(given):
            halves.setdefault(half["module"], {})[half["half"]] = tensor
            continue
        if not _is_named(given.rpartition(".")[0], config.get("modules_to_save") or []):
            raise UserError(f"{tensor.file}: tensor {name!r} is neither of LoRA nor saved whole")
        target = names.canonical(given, source.family.prefixes)
        base = _base_tensor(source, tensor, target, tensor.shape)
        merged[target] = Replaced(target, base.dtype, base.shape, _checked(tensor))
    for module, pair in halves.items():
        target = names.canonical(f"{module}.weight", source.family.prefixes)
        if target in merged:
            raise UserError(f"{path}: {target} is changed twice")
        merged[target] = _merged(path, config, source, module, pair)
    for key in _PATTERNS:
        for pattern in config.get(key) or {}:
            if not any(_matches(pattern, module) for module in halves):
                raise UserError(f"{path}: {key} names {pattern!r}, which matches no module there")
    if not merged:
        raise UserError(f"{path}: the adapter holds no tensor; download it again")
    return merged


def _merged(
    path: pathlib.Path,
    config: Mapping[str, Any],
    source: HFDirectory,
    module: str,
    pair: Mapping[str, Stored],
) -> Merged:
    if missing := {"A", "B"} - pair.keys():
        raise UserError(f"{path}: {module}.lora_{missing.pop()}.weight is missing")
    a, b = pair["A"], pair["B"]
    rank = _of(module, config.get("rank_pattern"), config["r"])
    alpha = _of(module, config.get("alpha_pattern"), config["lora_alpha"])
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise UserError(
            f"{path}: {module} has LoRA of shapes {a.shape} and {b.shape}, expected "
            f"({rank}, inputs) and (outputs, {rank}) by {ADAPTER_CONFIG}"
        )
    targets = config["target_modules"]
    if isinstance(targets, list) and not _is_named(module, targets):
        raise UserError(f"{path}: {module} has LoRA but is not in target_modules={targets!r}")
    name = names.canonical(f"{module}.weight", source.family.prefixes)
    base = _base_tensor(source, a, name, (b.shape[0], a.shape[1]))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    inputs, outputs = (_checked(x).read().astype(np.float32) for x in (a, b))
    return Merged(base.name, base.dtype, base.shape, base, inputs, outputs, scale)


def _base_tensor(source: HFDirectory, tensor: Stored, name: str, shape: tuple[int, ...]) -> Stored:
    """The tensor of the base that changes."""
    base = source.tensors.get(name)
    if base is None or base.shape != shape:
        there = "none" if base is None else f"{base.shape}"
        raise UserError(
            f"{_checked(tensor).file}: the adapter changes {name} of shape {shape}, but "
            f"{source.path} has {there}; name the adapter's own base with --base=HF_DIR"
        )
    family = source.family
    tied = family.tied(family.read_config(source.config, None))
    if name in {*tied, *tied.values()}:
        raise UserError(
            f"{tensor.file}: the adapter changes {name}, but head and embedding of {source.path} "
            "are tied, and PEFT's versions differ in what becomes of the other; merge with PEFT"
        )
    return _checked(base)


def _unchanged(
    config: Mapping[str, Any], source: HFDirectory, merged: Mapping[str, Any]
) -> list[str]:
    """Weights that the config names, but that the adapter has no LoRA of."""
    targets = config["target_modules"]
    partly = ("layers_to_transform", "exclude_modules")
    if not isinstance(targets, list) or any(config.get(key) for key in partly):
        return []
    others = sorted(source.tensors.keys() - merged.keys())
    weights = (name for name in others if name.endswith(".weight"))
    return [name for name in weights if _is_named(name.removesuffix(".weight"), targets)]


def _checked(tensor: Stored) -> Stored:
    if tensor.dtype not in FLOATS:
        raise UserError(
            f"{tensor.file}: tensor {tensor.name!r} has dtype {tensor.dtype}; quantised weights "
            "cannot be merged"
        )
    return tensor


def _is_named(module: str, targets: list[str]) -> bool:
    return any(module == x or module.endswith(f".{x}") for x in targets)


def _of(module: str, pattern: Mapping[str, float] | None, default: float) -> float:
    """The value of the first expression that matches a module."""
    found = (value for key, value in (pattern or {}).items() if _matches(key, module))
    return next(found, default)


def _matches(pattern: str, module: str) -> bool:
    """PEFT's rule: an expression for the whole name or for its last parts."""
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
