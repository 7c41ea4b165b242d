"""The 7B model's whole programs on the meshes that its shipped config is split over."""

import dataclasses
import pathlib

from jax.sharding import Mesh

from benchmarks.aot.report import Compiled
from benchmarks.aot.target import Target
from videonsa_jax.aot import programs
from videonsa_jax.aot.programs import RowShape
from videonsa_jax.aot.topology import Topology, parse_topology
from videonsa_jax.config.parse import load_config, parse
from videonsa_jax.config.run import RunConfig

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "videonsa_7b_sft.py")
VARIANTS = {"h100": "full", "v5e": "pod256", "v5p": "pod64", "v6e": "pod256"}
TEXT_TOKENS, NEW_TOKENS = 2048, 128
PREFILL = {"h100": "h100:1", "v5e": "v5e:16x16", "v5p": "v5p:4x4x4", "v6e": "v6e:16x16"}
TRAIN = PREFILL | {"h100": "h100:8"}
VISION_TOKENS = {  # of a row
    "prefill": {"h100": 131_072, "v5e": 36_864, "v5p": 36_864, "v6e": 36_864},
    "train": dict.fromkeys(TRAIN, 36_864),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """The prefill or the training step of `cfg` over full rows.

    Attributes:
      phase: "prefill" or "train".
      topology: the devices.
      cfg: its mesh has as many.
      shape: of the rows.
    """

    phase: str
    topology: Topology
    cfg: RunConfig
    shape: RowShape

    @property
    def name(self) -> str:
        return f"7B {'training step' if self.phase == 'train' else 'prefill'}"

    def compile(self, target: Target) -> Compiled:
        """See `Target.compile_program`."""
        mesh = self.topology.mesh(self.cfg.mesh)
        return target.compile_program(lambda: self._lower(mesh), mesh)

    def _lower(self, mesh: Mesh):
        if self.phase == "train":
            return programs.training_step(self.cfg, mesh, self.shape)
        return programs.prefill_step(self.cfg, mesh, self.shape, NEW_TOKENS)


def shipped(target: str, implementation: str, phase: str, vision_tokens: int) -> Program:
    """One row of `vision_tokens` at a time on each group of devices that shares a row."""
    topology = parse_topology({"train": TRAIN, "prefill": PREFILL}[phase][target])
    config = load_config(f"{CONFIG}:{VARIANTS[target]}")
    mesh = parse(config).mesh
    groups = topology.size // (mesh.tensor * mesh.context)
    cfg = parse(config, (f"mesh.fsdp={groups}", f"compute.implementation={implementation}"))
    rows = groups * (cfg.optim.grad_accum_steps if phase == "train" else 1)
    shape = RowShape(rows, vision_tokens, TEXT_TOKENS)
    return Program(phase, topology, programs.of_rows(cfg, shape), shape)
