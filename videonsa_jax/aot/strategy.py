"""Strategies by name: which rules, and how many devices along each axis of the mesh."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from videonsa_jax.config.schema import TextConfig
from videonsa_jax.errors import UserError
from videonsa_jax.sharding.mesh import AXES
from videonsa_jax.sharding.mesh_config import MeshConfig
from videonsa_jax.sharding.rules import PRESETS, Rules

# Where a name says nothing else: at most this many devices along an axis.
_DEFAULT = {"dcn": 2, "tensor": 4, "context": 4}


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A preset of rules and a mesh that it is used on."""

    name: str
    rules: Rules
    mesh: MeshConfig

    @property
    def row_groups(self) -> int:
        """Groups of devices that work on rows of their own."""
        return self.mesh.dcn * self.mesh.data * self.mesh.fsdp


def parse_strategy(text: str, devices: int, text_model: TextConfig) -> Strategy:
    """`fsdp_tp`, or `fsdp_tp:tensor=2` with sizes of mesh axes; the rest go to data or fsdp.

    Args:
      text: the name of a preset, and sizes joined by ":".
      devices: of the whole mesh.
      text_model: heads are split no further than its KV heads.

    Raises:
      UserError: no such preset or axis, or sizes that do not divide the devices.
    """
    name, *sizes = text.split(":")
    if name not in PRESETS:
        raise UserError(f"strategy {text!r}: {name!r} must be one of {sorted(PRESETS)}")
    rules = PRESETS[name]
    rest = _rest_axis(rules)
    free = [axis for axis in AXES if axis in rules.mesh_axes() and axis in _DEFAULT]
    chosen = {}
    for item in sizes:
        axis, _, size = item.partition("=")
        if axis not in free or not size.isdecimal() or int(size) < 1:
            raise UserError(f"strategy {text!r}: {item!r} must be one of {free} = a size")
        chosen[axis] = int(size)
    for axis in free:
        most = text_model.num_kv_heads if axis == "tensor" else devices
        left = devices // math.prod(chosen.values())
        chosen.setdefault(axis, math.gcd(_DEFAULT[axis], most, max(left, 1)))
    taken = math.prod(chosen.values())
    if devices % taken:
        raise UserError(f"strategy {text!r}: {chosen} does not divide {devices} devices")
    mesh = MeshConfig(**({"fsdp": 1} | chosen | {rest: devices // taken}))
    return Strategy(text, rules, mesh)


def factorisations(name: str, devices: int, text_model: TextConfig) -> Iterator[Strategy]:
    """The preset on every mesh of that many devices whose `tensor` axis splits the KV heads."""
    if name not in PRESETS:
        raise UserError(f"strategy {name!r} must be one of {sorted(PRESETS)}")
    axes = [axis for axis in AXES if axis in PRESETS[name].mesh_axes() and axis in _DEFAULT]
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for sizes in itertools.product(divisors, repeat=len(axes)):
        mesh = dict(zip(axes, sizes, strict=True))
        heads = text_model.num_kv_heads % mesh.get("tensor", 1) == 0
        if devices % math.prod(sizes) == 0 and heads:
            text = ":".join([name, *(f"{axis}={size}" for axis, size in mesh.items())])
            yield parse_strategy(text, devices, text_model)


def _rest_axis(rules):
    """The axis that takes the devices left over: parameters are split over it, if over any."""
    return "fsdp" if "fsdp" in rules.names("embed") else "data"
