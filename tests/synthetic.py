"""A tiny run without files: its config, and batches that are a function of the step."""

import dataclasses
import time

import numpy as np

from videonsa_jax.config import schema as config
from videonsa_jax.config.run import RunConfig
from videonsa_jax.config.schema import ComputeConfig, DataConfig, OptimConfig, TrainConfig
from videonsa_jax.data.pack import Bucket, frame_patches, pack
from videonsa_jax.data.sample import Sample, Visual
from videonsa_jax.sharding.mesh_config import MeshConfig
from videonsa_jax.sharding.shard import ShardIndex

MODEL = config.PRESETS["tiny"]
GRID = (2, 8, 8)  # 32 merged tokens, two NSA blocks
BUCKET = Bucket(vision_tokens=32, text_tokens=16)
ROWS = 8
FAST_COMPILE = {"xla_backend_optimization_level": 0}  # of programs that run once
FRAME_PATCHES = frame_patches([GRID], MODEL)
WHOLE = ShardIndex()  # of a process that runs alone
MESHES = {  # 8 devices for each of `rules.PRESETS`
    "dp": MeshConfig(data=8),
    "fsdp": MeshConfig(fsdp=8),
    "hsdp": MeshConfig(dcn=2, fsdp=4),
    "tp": MeshConfig(data=4, tensor=2),
    "fsdp_tp": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp_cp": MeshConfig(fsdp=4, context=2),
    "fsdp_tp_cp": MeshConfig(fsdp=2, tensor=2, context=2),
}


def run_config(*, optim: dict | None = None, train: dict | None = None, **sections) -> RunConfig:
    """float32, 8 rows; `optim` and `train` are changes to their sections."""
    optim = {"lr": 1e-3, "warmup_ratio": 0.25, "weight_decay": 0.1, **(optim or {})}
    train = {"steps": 4, "log_every": 1, "save_every": 2, **(train or {})}
    return RunConfig(
        **{
            "model": MODEL,
            "data": DataConfig(source=("synthetic",), tokenizer="none", batch=ROWS),
            "optim": OptimConfig(**optim),
            "train": TrainConfig(**train),
            "compute": ComputeConfig(dtype="float32", remat="none"),
            **sections,
        }
    )


def sample(rng: np.random.Generator, grid: tuple[int, int, int] = GRID) -> Sample:
    """A video between text tokens; the last six tokens are the answer."""
    t, h, w = grid
    count = t * h * w // MODEL.vision.merge_size**2
    text = rng.integers(1, 256, 12).astype(np.int32)
    video = np.full(count, MODEL.video_token_id, np.int32)
    tokens = np.concatenate([text[:4], video, text[4:]])
    weights = np.zeros(len(tokens), np.float32)
    weights[-6:] = 1
    patches = rng.standard_normal((t * h * w, MODEL.vision.patch_elements), np.float32)
    return Sample(tokens, weights, (Visual(patches, grid, is_video=True),))


def batch(seed: int, rows: int = ROWS) -> dict:
    """The array fields of `Batch`, drawn from `seed`."""
    rng = np.random.default_rng(seed)
    return pack([[sample(rng)] for _ in range(rows)], BUCKET, MODEL)


@dataclasses.dataclass
class Batches:
    """Batch i is drawn from seed i; a process sees its share of each batch's rows."""

    share: ShardIndex = WHOLE
    bad_from: int | None = None  # from this batch on, patches are NaN
    end: int | None = None  # asking for this batch fails, as a killed run does
    next_index: int = 0
    frame_patches: int = FRAME_PATCHES
    seconds: float = 0  # that a batch takes

    def __next__(self) -> dict[str, np.ndarray]:
        index, self.next_index = self.next_index, self.next_index + 1
        if index == self.end:
            raise InterruptedError(f"batch {index}")
        time.sleep(self.seconds)
        arrays = batch(index)
        if self.bad_from is not None and index >= self.bad_from:
            arrays["patches"][:] = np.nan
        rows = ROWS // self.share.count
        own = slice(self.share.index * rows, (self.share.index + 1) * rows)
        return {name: value[own] for name, value in arrays.items()}

    def get_state(self) -> dict:
        return {"next_index": self.next_index}

    def set_state(self, state: dict) -> None:
        self.next_index = state["next_index"]

    def close(self) -> None:
        self.end = self.next_index
