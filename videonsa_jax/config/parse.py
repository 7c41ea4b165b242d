"""Config files and command-line overrides -> one frozen `RunConfig`.

A config file holds only what differs from the dataclasses' defaults. The sections `model` and
`sharding` start from a preset: its name, or a dict of `preset` and the fields that differ.
"""

import ast
import dataclasses
import difflib
import importlib.util
import pathlib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from absl import flags
from ml_collections import ConfigDict

from videonsa_jax.config import schema
from videonsa_jax.config.run import RunConfig
from videonsa_jax.errors import UserError
from videonsa_jax.sharding import rules

SECTION_PRESETS = {"model": schema.PRESETS, "sharding": rules.PRESETS}
RENAMED = {  # fields of earlier versions
    "data.keep_frames": "data.frame_count_range",
    "eval.mcq": "eval.tasks.mcq",
    "eval.needle": "eval.tasks.needle",
    "optim.accumulation": "optim.grad_accum_steps",
    "train.keep": "train.max_to_keep",
    "train.max_consecutive_bad": "train.max_consecutive_nonfinite",
}


def define_config_flags() -> None:
    """The flags `--config` and `--override`, which `load_config` and `parse` take."""
    flags.DEFINE_string("config", None, "config file, path.py or path.py:variant", required=True)
    flags.DEFINE_multi_string(
        "override", [], "section.field=value; written --config.section.field="
    )


def override_flags(argv: Sequence[str]) -> list[str]:
    """Turns `--config.a.b=v` into `--override=a.b=v`, a flag that programs define."""
    return [re.sub(r"^--?config\.", "--override=", arg) for arg in argv]


def load_config(path: str) -> ConfigDict:
    """Calls `get_config` of a config file, `path.py` or `path.py:variant`.

    Raises:
      UserError: there is no such file.
    """
    path, _, variant = path.partition(".py:")
    file = pathlib.Path(path if path.endswith(".py") else path + ".py")
    if not file.is_file():
        raise UserError(f"--config={file}: no such file; the experiments are in configs/")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()


def parse(source: ConfigDict, overrides: Sequence[str] = ()) -> RunConfig:
    """The only reader of a ConfigDict.

    Args:
      source: from `load_config`; not changed.
      overrides: `section.field=value`, later ones win; any field may be named, also one that the
        config file leaves at its default.

    Raises:
      UserError: an unknown field (the message names near ones), a missing one, a wrong value.
    """
    values = source.to_dict()
    for override in overrides:
        _apply_override(values, override)
    return build(RunConfig, values, path="")


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dataclasses -> {"section.field": value}, in the order of their definition."""
    flat = {}
    for field in dataclasses.fields(cfg):
        value, path = getattr(cfg, field.name), prefix + field.name
        flat |= flatten(value, path + ".") if dataclasses.is_dataclass(value) else {path: value}
    return flat


def _apply_override(values: dict, override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--config.{path} has no value; write --config.{path}=VALUE")
    *sections, name = path.split(".")
    for at, section in enumerate(sections):
        inner = values.setdefault(section, {})
        if at == 0 and section in SECTION_PRESETS and isinstance(inner, str):
            inner = values[section] = {"preset": inner}
        if not isinstance(inner, dict):
            raise UserError(f"--config.{override}: {section}={inner!r} has no fields")
        values = inner
    values[name] = _literal(text)


def _literal(text: str) -> Any:
    """A Python literal, else the text itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def build(cls: type, values: Any, path: str = "", base: Any = None) -> Any:
    """An instance of dataclass `cls`: `values` over the fields of `base`, or over the defaults.

    Args:
      cls: a dataclass of numbers, strings, tuples and dataclasses.
      values: nested dicts and lists, as in a config file or in JSON.
      path: where `values` stands in the config, for messages.
      base: an instance of `cls`.

    Raises:
      UserError: as `parse`.
    """
    if path in SECTION_PRESETS and isinstance(values, str):
        values = {"preset": values}
    if not isinstance(values, Mapping):
        raise UserError(f"config.{path}={values!r} must be a dict of the fields of {cls.__name__}")
    if path in SECTION_PRESETS and "preset" in values:
        values = dict(values)
        base = _preset(path, values.pop("preset"))
    hints = typing.get_type_hints(cls)
    given, start = {}, cls if base is None else base
    for name, value in values.items():
        field = f"{path}.{name}" if path else name
        if name not in hints:
            raise UserError(_unknown(field))
        given[name] = _convert(hints[name], value, field, getattr(start, name, None))
    if base is None:
        for field in dataclasses.fields(cls):
            optional = {field.default, field.default_factory} != {dataclasses.MISSING}
            if not optional and field.name not in given:
                missing = f"{path}.{field.name}" if path else field.name
                raise UserError(f"config.{missing} is not set and has no default")
    try:
        return cls(**given) if base is None else dataclasses.replace(base, **given)
    except ValueError as error:
        raise UserError(f"{f'config.{path}' if path else 'config'}: {error}") from error


def _preset(section: str, name: str) -> Any:
    presets = SECTION_PRESETS[section]
    if name not in presets:
        raise UserError(f"config.{section}.preset={name!r} must be one of {sorted(presets)}")
    return presets[name]


def _convert(hint: Any, value: Any, path: str, base: Any = None) -> Any:
    """`value` as the annotated type; ints become floats and lists tuples, nothing else changes."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, path, base)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(args, value, path, base)
    if origin is tuple and isinstance(value, Mapping):
        value = sorted(value.items())
    if origin is tuple and isinstance(value, list | tuple):
        items = args[:1] * len(value) if args[1:] == (...,) else args
        if len(items) == len(value):
            pairs = enumerate(zip(items, value, strict=True))
            return tuple(_convert(item, v, f"{path}[{i}]") for i, (item, v) in pairs)
    elif origin is Literal:
        if value in args:
            return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint in (int, bool, str) and type(value) is hint:
        return value
    raise UserError(f"config.{path}={value!r} must be {_describe(hint)}")


def _convert_union(arms: tuple, value: Any, path: str, base: Any) -> Any:
    if value is None and types.NoneType in arms:
        return None
    arms = [arm for arm in arms if arm is not types.NoneType]
    for arm in arms[:-1]:
        try:
            return _convert(arm, value, path, base)
        except UserError:
            continue
    return _convert(arms[-1], value, path, base)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(arg) for arg in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _unknown(path: str) -> str:
    if path in RENAMED:
        return f"config.{path} is now config.{RENAMED[path]}"
    return f"unknown field config.{path}; {_near_matches(path)}"


def _near_matches(path: str) -> str:
    """Fields spelled alike, and fields of the same name in another section."""
    known = list(_schema_paths(RunConfig))
    name = path.rpartition(".")[2]
    near = difflib.get_close_matches(path, known, n=3)
    near += [field for field in known if field.rpartition(".")[2] == name and field not in near]
    if near:
        return "did you mean " + " or ".join(f"config.{field}" for field in near[:4]) + "?"
    section = path.rpartition(".")[0] + "." if "." in path else ""
    return f"fields there: {', '.join(field for field in known if field.startswith(section))}"


def _schema_paths(cls: type, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        if prefix == "" and name in SECTION_PRESETS:
            yield f"{name}.preset"
        if dataclasses.is_dataclass(hint):
            yield from _schema_paths(hint, f"{prefix}{name}.")
        else:
            yield prefix + name
