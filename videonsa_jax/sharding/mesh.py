"""The device mesh."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from videonsa_jax.errors import UserError
from videonsa_jax.sharding.mesh_config import MeshConfig
from videonsa_jax.sharding.rules import MESH_AXES as AXES


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices`, or over all devices of all processes.

    Raises:
      UserError: the axes' product is not the number of devices, or `dcn` is not the number of
        slices of TPUs.
    """
    devices = jax.devices() if devices is None else devices
    cfg = cfg.resolved(len(devices))
    shape, types = _shape(cfg), (AxisType.Auto,) * len(AXES)
    if math.prod(shape) != len(devices):
        sizes = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise UserError(
            f"config.mesh: {sizes} is {math.prod(shape)} devices, but there are {len(devices)}; "
            f"{_nearest(shape, len(devices))}"
        )
    # Auto: the compiler places what `Rules` does not pin; JAX's default of Explicit would not.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        # An axis may be a part of a dimension of a TPU's torus: 32 x 8 of 16x16 chips.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)
    if slices != cfg.dcn:
        raise UserError(
            f"config.mesh.dcn={cfg.dcn}, but the devices are {slices} slices, which only the "
            f"slower network joins; use --config.mesh.dcn={slices}"
        )
    between = (slices,) + (1,) * (len(AXES) - 1)
    grid = mesh_utils.create_hybrid_device_mesh(
        (1, *shape[1:]), between, devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=types)


def _shape(cfg: MeshConfig) -> tuple[int, ...]:
    return tuple(getattr(cfg, axis) for axis in AXES)


def _nearest(shape: tuple[int, ...], devices: int) -> str:
    """Which axis to change, and to what: by the smallest factor."""
    fits = []
    for axis, size in zip(AXES, shape, strict=True):
        others = math.prod(shape) // size
        if devices % others == 0:
            fits.append((abs(math.log(devices // others / size)), axis, devices // others))
    if not fits:
        return f"for example --config.mesh.fsdp={devices} and 1 elsewhere"
    _, axis, size = min(fits)
    return f"for example --config.mesh.{axis}={size}"


def abstract_mesh(cfg: MeshConfig) -> AbstractMesh:
    """The mesh without devices: enough to lay parameters out, on any machine.

    An axis of -1 takes the rest of the devices that are here.
    """
    shape = _shape(cfg.resolved(jax.device_count()))
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
