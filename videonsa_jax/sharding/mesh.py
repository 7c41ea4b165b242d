"""The device mesh, and the processes that share it."""

import math
import os
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from videonsa_jax.config import MeshConfig
from videonsa_jax.errors import UserError
from videonsa_jax.sharding.rules import MESH_AXES as AXES


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices`, or over all devices of all processes.

    Raises:
      UserError: the axes' product is not the number of devices, or `dcn` is not the number of
        slices of TPUs.
    """
    devices = jax.devices() if devices is None else devices
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
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    if slices != cfg.dcn:
        raise UserError(
            f"config.mesh.dcn={cfg.dcn}, but the devices are {slices} slices, which only the "
            f"slower network joins; use --config.mesh.dcn={slices}"
        )
    between = (slices,) + (1,) * (len(AXES) - 1)
    grid = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), between, devices)
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
    """The mesh without devices: enough to lay parameters out, on any machine."""
    return AbstractMesh(_shape(cfg), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def join_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Connects the processes of one run; does nothing for a run of one process.

    Must come before anything asks JAX for devices. Each value left at None is read from
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES or JAX_PROCESS_ID. `coordinator="auto"` lets JAX ask
    the cluster (Cloud TPU, Slurm, Open MPI, Kubernetes).

    Raises:
      UserError: some of the three are given and some are not.
    """
    if coordinator == "auto":
        jax.distributed.initialize()
        return
    env = os.environ
    settings = {
        "coordinator": coordinator or env.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _first(num_processes, env.get("JAX_NUM_PROCESSES")),
        "process_id": _first(process_id, env.get("JAX_PROCESS_ID")),
    }
    missing = [name for name, value in settings.items() if value is None]
    if len(missing) == len(settings):
        return
    if missing:
        raise UserError(f"--{missing[0]} is missing: a run of several processes needs all three")
    jax.distributed.initialize(*settings.values())


def _first(flag: int | None, text: str | None) -> int | None:
    if flag is not None:
        return flag
    return None if text is None else int(text)
