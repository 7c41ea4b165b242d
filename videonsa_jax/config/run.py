"""The configuration of a run: all sections together."""

import dataclasses

from videonsa_jax.config.schema import (
    ComputeConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from videonsa_jax.sharding.mesh_config import MeshConfig
from videonsa_jax.sharding.rules import PRESETS, Rules


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    sharding: Rules = PRESETS["fsdp"]
    seed: int = 0

    def __post_init__(self):
        if self.model.attention == "released" and self.data.samples_per_row > 1:
            raise ValueError(
                f"{self.data.samples_per_row=} must be 1 where model.attention is 'released', "
                "which knows one sequence per row"
            )
