"""The device mesh, and the processes that share it."""

import math
import os
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from videonsa_jax.config import MeshConfig
from videonsa_jax.errors import UserError

AXES = ("dcn", "data", "fsdp", "tensor", "context")


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices`, or over all devices of all processes.

    Raises:
      UserError: the axes' product is not the number of devices.
    """
    shape = tuple(getattr(cfg, axis) for axis in AXES)
    count = len(devices if devices is not None else jax.devices())
    if math.prod(shape) != count:
        sizes = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise UserError(
            f"config.mesh: {sizes} is {math.prod(shape)} devices, but there are {count}; "
            f"for example --config.mesh.fsdp={count} and 1 elsewhere"
        )
    # Auto: the compiler places what `Rules` does not pin; JAX's default of Explicit would not.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def abstract_mesh(cfg: MeshConfig) -> AbstractMesh:
    """The mesh without devices: enough to lay parameters out, on any machine."""
    shape = tuple(getattr(cfg, axis) for axis in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


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
