"""Logical axes -> mesh axes. A sharding strategy is one `Rules` value.

Parameters name their axes where they are created; activations are constrained by the same letters
at a few places of each layer. Only this package knows the mesh.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec

MeshAxes = str | tuple[str, ...] | None
Axes = tuple[str | None, ...]  # a logical axis per dimension; None: not split


@dataclasses.dataclass(frozen=True)
class Rules:
    """One field per logical axis; its value is the mesh axes that split it, None for none."""

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

    def spec(self, *axes: str | None) -> PartitionSpec:
        """Logical axis per dimension (None: not split) -> PartitionSpec.

        Raises:
          ValueError: two dimensions would be split over the same mesh axis.
        """
        parts = [None if axis is None else getattr(self, axis) for axis in axes]
        used = [
            name for part in parts if part for name in ((part,) if isinstance(part, str) else part)
        ]
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {axes} use a mesh axis twice: {parts}")
        return PartitionSpec(*parts)

    def mesh_axes(self) -> set[str]:
        """The mesh axes that split something."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return {axis for v in values if v for axis in ((v,) if isinstance(v, str) else v)}

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Pins an activation's sharding under the mesh of `jax.set_mesh`; a no-op without one."""
        if jax.sharding.get_abstract_mesh().empty:
            return x
        return jax.lax.with_sharding_constraint(x, self.spec(*axes))

    def shard_op(self, op: Callable, in_axes: Sequence[Axes], out_axes: Axes) -> Callable:
        """Runs an operation on each device's part, under the mesh of `jax.set_mesh`.

        The partitioner cannot look into a hand-written kernel and would run all of it everywhere.

        Args:
          op: of arrays, or of trees of arrays; its parts must not depend on each other.
          in_axes: logical axes per argument, of the leading dimensions of all its arrays.
          out_axes: of its result.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return op
        in_specs = tuple(self.spec(*axes) for axes in in_axes)
        # check_vma knows nothing of Pallas calls.
        return jax.shard_map(op, in_specs=in_specs, out_specs=self.spec(*out_axes), check_vma=False)


_NO_TENSOR = dict.fromkeys(
    ("act_heads", "act_mlp", "act_vocab", "heads", "kv_heads", "mlp", "vocab"), None
)

PRESETS: dict[str, Rules] = {
    "dp": Rules(embed=None, **_NO_TENSOR),  # every device holds all parameters
    "fsdp": Rules(**_NO_TENSOR),  # parameters are split, gathered layer by layer
    "tp": Rules(embed=None),  # heads, mlp and vocabulary are split
    "fsdp_tp": Rules(),
    "fsdp_cp": Rules(seq="context", **_NO_TENSOR),  # also the sequence; attention gathers its keys
}
