"""The families that are known: found by what a config.json or a manifest says."""

import pathlib
from collections.abc import Mapping
from typing import Any

from convert.models import videonsa
from convert.models.family import Family
from convert.models.qwen2_5_vl import family as qwen2_5_vl
from convert.store import manifest
from videonsa_jax.errors import UserError

_OF_RUNS = videonsa.FAMILY  # what `train.py` trains
FAMILIES: dict[str, Family] = {}  # by name


def register(family: Family) -> None:
    """Makes a family known to all verbs.

    Raises:
      ValueError: another one has its name or its architecture.
    """
    for other in FAMILIES.values():
        if family.name == other.name or family.architecture == other.architecture:
            what = f"{family.name} ({family.architecture})"
            raise ValueError(f"{what} is already known as {other.name} ({other.architecture})")
    FAMILIES[family.name] = family


def find(config: Mapping[str, Any]) -> Family | None:
    """The family of a config.json, by the first class that it names, or else by its model type."""
    named = config.get("architectures")
    for family in FAMILIES.values():
        if named and isinstance(named, list) and family.architecture == named[0]:
            return family
        if not named and family.model_type == config.get("model_type"):
            return family
    return None


def of_config(config: Mapping[str, Any]) -> Family:
    """As `find`.

    Raises:
      UserError: it is of no family that is known.
    """
    if (family := find(config)) is not None:
        return family
    field, key = "model_type", "model_type"
    if config.get("architectures"):
        field, key = "architectures", "architecture"
    allowed = dict.fromkeys(getattr(family, key) for family in FAMILIES.values())
    raise UserError(
        f"config.json: {field}={config.get(field)!r} is not supported; "
        f"allowed: {' or '.join(allowed)}"
    )


def of_checkpoint(folder: str | pathlib.Path) -> Family:
    """The family that a checkpoint was converted from; of a trained run, the one it belongs to.

    Raises:
      UserError: its manifest is damaged, or names no family that is known.
    """
    made_by = manifest.read(folder)
    if made_by is None:
        return _OF_RUNS
    if made_by.architecture not in FAMILIES:
        raise UserError(
            f"{pathlib.Path(folder) / manifest.FILE}: architecture={made_by.architecture!r} is not "
            f"known; allowed: {' or '.join(FAMILIES)}"
        )
    return FAMILIES[made_by.architecture]


for _family in (qwen2_5_vl.FAMILY, videonsa.FAMILY):
    register(_family)
