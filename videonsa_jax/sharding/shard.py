"""Shardings of parameters and batches under a mesh, and what they cost per device."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from videonsa_jax.batch import Batch
from videonsa_jax.errors import UserError
from videonsa_jax.sharding.rules import Rules


@dataclasses.dataclass(frozen=True)
class ParamLayout:
    """One parameter on the mesh, before it exists."""

    path: str  # "/"-joined
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding

    @property
    def size(self) -> int:
        """Numbers in the whole parameter."""
        return math.prod(self.shape)

    @property
    def bytes_per_device(self) -> int:
        """Bytes of the part that one device holds."""
        return math.prod(self.sharding.shard_shape(self.shape)) * self.dtype.itemsize

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """What `jax.eval_shape` and a restore take."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def param_layouts(state: nnx.State, rules: Rules, mesh: Mesh | AbstractMesh) -> list[ParamLayout]:
    """Lays out a model's parameters by the logical axes they were created with.

    Args:
      state: of the model or of its `nnx.eval_shape`; each parameter carries `logical_axes`.
      rules: logical -> mesh axes.
      mesh: has every mesh axis the rules name.

    Raises:
      UserError: a dimension cannot be split evenly, or the rules leave a mesh axis idle.
      ValueError: two dimensions of a parameter would be split over the same mesh axis.
    """
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in rules.mesh_axes():
            raise UserError(
                f"config.mesh.{axis}={size}, but config.sharding splits nothing over {axis!r}; "
                f"set the axis to 1 or choose a preset that uses it"
            )
    layouts = []
    for path, param in nnx.to_flat_state(state):
        path = "/".join(str(part) for part in path)
        spec = rules.spec(*param.logical_axes)
        _check_even(path, param.shape, param.logical_axes, spec, mesh)
        sharding = NamedSharding(mesh, spec)
        layouts.append(ParamLayout(path, param.shape, np.dtype(param.dtype), sharding))
    return layouts


def _check_even(
    path: str, shape: tuple, logical: tuple, spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> None:
    for size, name, axes in zip(shape, logical, spec, strict=True):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            fits = max(count for count in range(1, parts) if size % count == 0)
            raise UserError(
                f"{path}: its {name!r} dimension of {size} cannot be split over {parts} devices "
                f"({', '.join(axes)}); use {fits}, or --config.sharding.{name}=None"
            )


def check_rows(
    lengths: Iterable[tuple[int, int]], block: int, rules: Rules, mesh: Mesh | AbstractMesh
) -> None:
    """That the devices which share a row get whole blocks of it.

    Args:
      lengths: (vision, text) slots of the rows, as in `DataConfig.buckets`.
      block: tokens per block of sparse attention.
      rules: `seq` says over which mesh axes a row is split.
      mesh: has these axes.

    Raises:
      UserError: a stream cannot be split so.
    """
    axes = rules.names("seq")
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if parts == 1:
        return
    for vision, text in lengths:
        fits = max(n for n in range(1, parts) if n == 1 or not (vision % (n * block) or text % n))
        for stream, slots, unit in (("vision", vision, block), ("text", text, 1)):
            step = parts * unit
            if slots % step:
                how = f"in whole blocks of {unit}" if unit > 1 else "evenly"
                raise UserError(
                    f"config.data.buckets: {slots} {stream} slots cannot be split {how} over "
                    f"{parts} devices ({', '.join(axes)}); use {-(-slots // step) * step} slots, "
                    f"or {fits} devices"
                )


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The rows of a batch that a process loads: shard `index` of `count` equal ones."""

    index: int = 0
    count: int = 1


def row_shard(rules: Rules, mesh: Mesh) -> ShardIndex:
    """Of this process: the rows that its devices work on.

    Processes whose devices work on the same rows have the same shard, and each loads it.

    Raises:
      UserError: some processes would have to load a part of each other's rows.
    """
    names = rules.names("batch")
    groups = math.prod(mesh.shape[name] for name in names)
    axes = [mesh.axis_names.index(name) for name in names]
    devices = np.moveaxis(mesh.devices, axes, range(len(names))).reshape(groups, -1)
    held: dict[int, list[int]] = {}  # process -> groups of devices that share a row
    for group, members in enumerate(devices):
        for process in {device.process_index for device in members}:
            held.setdefault(process, []).append(group)
    shares = sorted({tuple(found) for found in held.values()})
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) > groups:
        others = " x ".join(f"{x}={mesh.shape[x]}" for x in mesh.axis_names if x not in names)
        raise UserError(
            f"config.mesh: {others} lets processes share some of their rows and not others; use "
            f"sizes that divide, or are a multiple of, the {devices.size // len(held)} devices of "
            "a process"
        )
    return ShardIndex(shares.index(tuple(held[jax.process_index()])), len(shares))


def global_batch(
    arrays: Mapping[str, np.ndarray], frame_patches: int, rules: Rules, mesh: Mesh
) -> Batch:
    """The rows that this process loaded -> its part of the batch of all processes.

    Args:
      arrays: the array fields of `Batch`, of this process's `row_shard`.
      frame_patches: its static field.
      rules: `batch` and `seq` say over which mesh axes rows and their slots are split.
      mesh: of all processes.

    Raises:
      UserError: the rows or their slots cannot be split evenly over the mesh; as `row_shard`.
    """
    count = row_shard(rules, mesh).count
    sharding = NamedSharding(mesh, rules.spec("batch", "seq"))
    placed = {}
    for name, value in arrays.items():
        shape = (len(value) * count, *value.shape[1:])
        check_split(name, *shape[:2], sharding)
        placed[name] = jax.make_array_from_process_local_data(sharding, value, shape)
    return Batch(**placed, frame_patches=frame_patches)


def check_split(name: str, rows: int, slots: int, sharding: NamedSharding) -> None:
    """That arrays [b s ...] can be split so.

    Raises:
      UserError: they cannot.
    """
    try:
        sharding.shard_shape((rows, slots))
    except ValueError as error:
        raise UserError(
            f"{name}: {rows} rows a step of {slots} slots cannot be split over "
            f"{dict(sharding.mesh.shape)}; change the rows, the slots or the mesh"
        ) from error


def describe_layouts(layouts: Iterable[ParamLayout]) -> str:
    """A table of all parameters: path, shape, partition, numbers, MiB on one device."""
    layouts = list(layouts)
    width = max(len(layout.path) for layout in layouts)
    lines = [
        f"{layout.path:<{width}}  {layout.shape!s:<24} {_describe_spec(layout.sharding.spec):<36} "
        f"{layout.size:>14,} {layout.bytes_per_device / 2**20:>12,.2f}"
        for layout in layouts
    ]
    size = sum(layout.size for layout in layouts)
    mebibytes = sum(layout.bytes_per_device for layout in layouts) / 2**20
    head = f"{'parameter':<{width}}  {'shape':<24} {'split over':<36} {'numbers':>14} "
    head += f"{'MiB a device':>12}"
    total = f"{'total':<{width}}  {'':<24} {'':<36} {size:>14,} {mebibytes:>12,.2f}"
    return "\n".join([head, *lines, total])


def _describe_spec(spec: PartitionSpec) -> str:
    parts = (part if isinstance(part, str) else "+".join(part or "-") for part in spec)
    return "(" + ", ".join(parts) + ")"
