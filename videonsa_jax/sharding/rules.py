"""Logical axes -> mesh axes. A sharding strategy is one `Rules` value.

Parameters name their axes where they are created; activations are constrained by the same letters
at a few places of each layer. Only this package knows the mesh.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from pallas_kernels import MeshAxis
from videonsa_jax.sharding.mesh_config import MeshConfig

MESH_AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))
MeshAxes = str | tuple[str, ...] | None
Axes = tuple[str | None, ...]  # a logical axis per dimension; None: not split


@dataclasses.dataclass(frozen=True)
class Rules:
    """One field per logical axis; its value is the mesh axes that split it, None for none.

    Raises:
      ValueError: a value names no axis of the mesh.
    """

    # activations
    batch: MeshAxes = ("data", "fsdp")
    seq: MeshAxes = None
    act_heads: MeshAxes = "tensor"
    act_mlp: MeshAxes = "tensor"
    act_vocab: MeshAxes = "tensor"
    # parameters
    layers: MeshAxes = None
    embed: MeshAxes = "fsdp"  # the model width of a parameter; an activation's is never split
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if unknown := [name for name in self.names(field.name) if name not in MESH_AXES]:
                near = difflib.get_close_matches(unknown[0], MESH_AXES, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(
                    f"{field.name}={value!r} names the mesh axis {unknown[0]!r}, which does not "
                    f"exist; {hint}The axes are {', '.join(MESH_AXES)}"
                )

    def spec(self, *axes: str | None) -> PartitionSpec:
        """Logical axis per dimension (None: not split) -> PartitionSpec.

        Raises:
          ValueError: two dimensions would be split over the same mesh axis.
        """
        parts = [None if axis is None else getattr(self, axis) for axis in axes]
        used = [name for part in parts for name in _names(part)]
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {axes} use a mesh axis twice: {parts}")
        return PartitionSpec(*parts)

    def mesh_axes(self) -> set[str]:
        """The mesh axes that split something."""
        return {name for field in dataclasses.fields(self) for name in self.names(field.name)}

    def names(self, axis: str) -> tuple[str, ...]:
        """The mesh axes that split a logical axis."""
        return _names(getattr(self, axis))

    def mesh_axis(self, axis: str) -> MeshAxis | None:
        """Those that split a logical axis under the mesh of `jax.set_mesh`; None if it is whole."""
        mesh, names = jax.sharding.get_abstract_mesh(), self.names(axis)
        if mesh.empty:
            return None
        size = math.prod(mesh.shape[name] for name in names)
        return MeshAxis(names, size) if size > 1 else None

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Pins an activation's sharding under the mesh of `jax.set_mesh`; a no-op without one."""
        if jax.sharding.get_abstract_mesh().empty:
            return x
        return jax.lax.with_sharding_constraint(x, self.spec(*axes))

    def lookup(self, table: Callable, tokens: jax.Array, *axes: str | None) -> jax.Array:
        """Rows of a table whose columns are split as `embed`, split as the tokens.

        A device looks its columns up for the tokens of all devices with the other columns. Then
        columns are exchanged for tokens along one mesh axis after the other, and so are the
        gradients. In one step the partitioner would copy all tokens, or the table, to all devices.

        Args:
          table: i32[...] -> f[... d].
          tokens: i32[...].
          axes: logical axes of the tokens.
        """
        if jax.sharding.get_abstract_mesh().empty:
            return table(tokens)
        columns, parts = self.names("embed"), [self.names(axis) if axis else () for axis in axes]

        def split(left):  # `left` still split columns, and not yet tokens
            return [tuple(name for name in part if name not in left) for part in parts]

        x = table(_pinned(tokens, *split(columns)))
        for end in range(len(columns), -1, -1):  # the last axis splits neighbouring columns
            x = _pinned(x, *split(columns[:end]), columns[:end])
        return x

    def shard_op(self, op: Callable, in_axes: Sequence[Any], out_axes: Any) -> Callable:
        """Runs an operation on each device's part, under the mesh of `jax.set_mesh`.

        The partitioner cannot look into a hand-written kernel and would run all of it everywhere.

        Args:
          op: of arrays, or of trees of arrays; parts that depend on each other must say so.
          in_axes: logical axes `Axes` per argument, of the leading dimensions of all its arrays; or
            a tree of them that begins as the argument does.
          out_axes: likewise of its result.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return op

        def specs(axes):
            return jax.tree.map(lambda axes: self.spec(*axes), axes, is_leaf=_is_axes)

        # check_vma knows nothing of Pallas calls.
        return jax.shard_map(
            op, in_specs=specs(tuple(in_axes)), out_specs=specs(out_axes), check_vma=False
        )


def _pinned(x: jax.Array, *parts: tuple[str, ...]) -> jax.Array:
    """Constrains each dimension to be split over some mesh axes."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(part or None for part in parts)))


def _names(axes: MeshAxes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def _is_axes(tree: Any) -> bool:
    return type(tree) is tuple and all(axis is None or isinstance(axis, str) for axis in tree)


_NO_TENSOR = dict.fromkeys(
    ("act_heads", "act_mlp", "act_vocab", "heads", "kv_heads", "mlp", "vocab"), None
)

PRESETS: dict[str, Rules] = {
    "dp": Rules(embed=None, **_NO_TENSOR),  # every device holds all parameters
    "fsdp": Rules(**_NO_TENSOR),  # parameters are split, gathered layer by layer
    # the same in each of several groups of devices, which exchange gradients only
    "hsdp": Rules(batch=("dcn", "data", "fsdp"), **_NO_TENSOR),
    "tp": Rules(embed=None),  # heads, mlp and vocabulary are split
    "fsdp_tp": Rules(),
    # also the sequence, and parameters over the devices that split it
    "fsdp_cp": Rules(seq="context", embed=("fsdp", "context"), **_NO_TENSOR),
    "fsdp_tp_cp": Rules(seq="context", embed=("fsdp", "context")),
}
