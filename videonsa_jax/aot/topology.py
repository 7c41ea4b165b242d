"""Devices that are not there: what they have, and meshes of them to compile programs for."""

import dataclasses
import importlib.metadata
import math
import os
import pathlib
import re

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

from videonsa_jax.errors import UserError
from videonsa_jax.sharding.mesh import make_mesh
from videonsa_jax.sharding.mesh_config import MeshConfig


class ToolchainMissing(UserError):
    """This Python, or this machine, lacks what compiling for a device needs."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as a program sees it. Rates are per second, and peaks that their makers state.

    Attributes:
      kind: the name under which JAX knows it.
      platform: "gpu" or "tpu".
      memory_bytes: what a program may use.
      flops: bfloat16 operations of the matrix units, without sparsity.
      memory_rate: bytes to and from the device's memory.
      link_rate: bytes that a device can receive from the others of a mesh axis: on a GPU over
        NVLink, on a TPU over both directions of one dimension of its torus.
      packages: what compiles for it.
    """

    kind: str
    platform: str
    memory_bytes: int
    flops: float
    memory_rate: float
    link_rate: float
    packages: tuple[str, ...]


_CUDA, _TPU = ("jax-cuda13-plugin", "jax-cuda13-pjrt"), ("libtpu",)

# Memory of TPUs: what libtpu says is available when a program asks for too much. Rates: NVIDIA's
# data sheet of the H100 SXM, Google Cloud's pages of the TPU generations.
CHIPS = {
    "h100": Chip(
        kind="NVIDIA H100 80GB HBM3",
        platform="gpu",
        memory_bytes=84_942_979_072,
        flops=989e12,
        memory_rate=3.35e12,
        link_rate=450e9,
        packages=_CUDA,
    ),
    "v5e": Chip("TPU v5 lite", "tpu", int(15.75 * 2**30), 197e12, 819e9, 100e9, _TPU),
    "v5p": Chip("TPU v5", "tpu", int(95.74 * 2**30), 459e12, 2765e9, 200e9, _TPU),
    "v6e": Chip("TPU v6 lite", "tpu", int(31.25 * 2**30), 918e12, 1640e9, 200e9, _TPU),
}
GPUS_PER_NODE = 8
_GPU_CONFIG = pathlib.Path(__file__).with_name("h100.txtpb")
_DIMENSIONS = {"v5e": 2, "v5p": 3, "v6e": 2}  # of a TPU's torus
_EXAMPLES = "h100:8, v5e:16x16, v5p:4x4x4, v6e:16x16"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind and how they are wired, such as `v5p:4x4x4`."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.shape)

    @property
    def compiler_options(self) -> dict[str, object]:
        """What compiling without the device needs: nothing can be tried out."""
        return {"xla_gpu_autotune_level": 0} if self.chip.platform == "gpu" else {}

    def require(self) -> None:
        """Raises ToolchainMissing if this Python cannot compile for these devices."""
        if lost := [name for name in self.chip.packages if not _installed(name)]:
            raise ToolchainMissing(f"{', '.join(lost)} not installed")
        if os.environ.get("JAX_PLATFORMS") != "cpu":
            raise ToolchainMissing(
                "JAX_PLATFORMS is not 'cpu': these packages would look for a device"
            )

    def devices(self) -> list[jax.Device]:
        """One per chip; programs can be compiled for them, and not run.

        Raises:
          ToolchainMissing: this Python cannot compile for them.
          UserError: no such TPU is built.
        """
        self.require()
        if self.chip.platform == "gpu":
            described = topologies.get_topology_desc(
                topology_name="",
                platform="cuda",
                target_config=_GPU_CONFIG.read_text(),
                topology=f"1x1x{self.size}",
            )
            return list(described.devices)
        # Nothing runs, so other processes may load libtpu too. The others are what libtpu asks the
        # cloud for, and complains about where there is none.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_WORKER_ID", "0")
        try:
            described = topologies.get_topology_desc(platform="tpu", topology_name=self.name)
        except jax.errors.JaxRuntimeError as error:
            line = str(error).splitlines()[0]
            raise UserError(f"topology {self.name!r}: {line}; for example {_EXAMPLES}") from error
        return list(described.devices)

    def mesh(self, cfg: MeshConfig) -> Mesh:
        """A mesh of all the devices.

        Raises:
          ToolchainMissing: as `devices`.
          UserError: as `devices`, or the axes' product is not the number of devices.
        """
        return make_mesh(cfg, self.devices())

    def tracing(self, mesh: Mesh | None = None) -> AbstractMesh:
        """What `jax.sharding.use_abstract_mesh` takes while a program is traced.

        It names the device, by which kernels choose themselves and their sizes.

        Args:
          mesh: of these devices; None: a program for one device, without a mesh.
        """
        cores = None if self.chip.platform == "gpu" else self.devices()[0].num_cores
        device = AbstractDevice(
            device_kind=self.chip.kind, num_cores=cores, platform=self.chip.platform
        )
        if mesh is None:
            return AbstractMesh((), (), abstract_device=device)
        return AbstractMesh(
            mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types, abstract_device=device
        )


def parse_topology(name: str) -> Topology:
    """`h100:8` (GPUs of one node), `v5p:4x4x4` (chips along each dimension of a torus).

    Raises:
      UserError: there is no such topology.
    """
    kind, _, text = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"topology {name!r}: {kind!r} must be one of {sorted(CHIPS)}: {_EXAMPLES}")
    dimensions = _DIMENSIONS.get(kind, 1)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text) or text.count("x") + 1 != dimensions:
        raise UserError(
            f"topology {name!r}: {text!r} must be {dimensions} size(s) joined by 'x': {_EXAMPLES}"
        )
    shape = tuple(int(size) for size in text.split("x"))
    if CHIPS[kind].platform == "gpu" and shape[0] > GPUS_PER_NODE:
        raise UserError(f"topology {name!r}: a node has {GPUS_PER_NODE} GPUs at most")
    return Topology(name, CHIPS[kind], shape)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
