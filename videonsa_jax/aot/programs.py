"""The programs of a run over abstract arrays, sharded as its config says: what to compile."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding

from videonsa_jax.batch import Batch, Cache
from videonsa_jax.config.run import RunConfig
from videonsa_jax.data import pack
from videonsa_jax.model.generate import prefill
from videonsa_jax.sharding import shard
from videonsa_jax.sharding.rules import Rules
from videonsa_jax.training import state as state_lib
from videonsa_jax.training.optimizer import Optimizer
from videonsa_jax.training.step import CompiledStep


@dataclasses.dataclass(frozen=True)
class RowShape:
    """How many rows a batch has, and how many slots a row has for tokens of each kind."""

    rows: int
    vision_tokens: int
    text_tokens: int


def of_rows(cfg: RunConfig, shape: RowShape) -> RunConfig:
    """A run of rows of this shape alone, which then are the ones that must be split evenly."""
    buckets = ((shape.vision_tokens, shape.text_tokens),)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, buckets=buckets))


def training_step(cfg: RunConfig, mesh: Mesh, shape: RowShape) -> jax.stages.Lowered:
    """The step that `train.py` runs, its state donated.

    Must be called under the mesh, as `jax.set_mesh` or `Topology.tracing` give it.

    Args:
      cfg: model, optimizer and sharding.
      mesh: of `cfg.mesh`.
      shape: of the step's rows, all accumulated parts together.
    """
    optimizer = Optimizer(cfg.optim, cfg.train.steps)
    graphdef, layouts = state_lib.abstract_model(cfg, mesh)
    state = state_lib.abstract_state(layouts, optimizer, mesh)
    step = CompiledStep(graphdef, optimizer, state_lib.shardings(state), mesh)
    return step.lower(state, abstract_batch(cfg, mesh, shape))


def prefill_step(
    cfg: RunConfig, mesh: Mesh, shape: RowShape, new_tokens: int
) -> jax.stages.Lowered:
    """The prefill of questions, with parameters in the dtype they are computed in.

    Args:
      cfg: model and sharding.
      mesh: as in `training_step`.
      shape: of the questions, one per row.
      new_tokens: that the cache has room for.
    """
    cfg = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, remat="none"))
    graphdef, layouts = state_lib.abstract_model(cfg, mesh)
    params = {
        layout.path: jax.ShapeDtypeStruct(layout.shape, cfg.compute.dtype, sharding=layout.sharding)
        for layout in layouts
    }

    def run(params, batch):
        return prefill(nnx.merge(graphdef, params), batch, new_tokens)

    spec = NamedSharding(mesh, cfg.sharding.spec("batch"))
    jitted = jax.jit(run, out_shardings=(spec, _cache_shardings(cfg.sharding, mesh)))
    nested = traverse_util.unflatten_dict(params, sep="/")
    return jitted.lower(nested, abstract_batch(cfg, mesh, shape))


def _cache_shardings(rules: Rules, mesh: Mesh) -> Cache:
    rows = NamedSharding(mesh, rules.spec("batch"))
    heads = NamedSharding(mesh, rules.spec(None, "batch", None, "kv_heads"))
    return Cache(
        keys=heads,
        values=heads,
        key_order=rows,
        next_slot=shard.replicated(mesh),
        next_order=rows,
        next_position=rows,
    )


def abstract_batch(cfg: RunConfig, mesh: Mesh, shape: RowShape) -> Batch:
    """Full rows of the largest frames that the config allows."""
    rows, vision, text = shape.rows, shape.vision_tokens, shape.text_tokens
    patches = vision * cfg.model.vision.merge_size**2
    frame = cfg.data.max_pixels // cfg.model.vision.patch_size**2
    sharding = NamedSharding(mesh, cfg.sharding.spec("batch", "seq"))

    def array(dtype, *sizes):
        return jax.ShapeDtypeStruct((rows, *sizes), dtype, sharding=sharding)

    def ints(*sizes):
        return array(jnp.int32, *sizes)

    def floats(*sizes):
        return array(jnp.float32, *sizes)

    return Batch(
        text_tokens=ints(text),
        text_targets=ints(text),
        text_weights=floats(text),
        text_positions=ints(text, 3),
        text_order=ints(text),
        text_start=ints(text),
        vision_positions=ints(vision, 3),
        vision_order=ints(vision),
        vision_start=ints(vision),
        vision_segment=ints(vision),
        vision_slot=ints(vision),
        patches=floats(patches, cfg.model.vision.patch_elements),
        patch_positions=ints(patches, 2),
        patch_window=ints(patches, 2),
        patch_frame=ints(patches, 2),
        frame_patches=pack.frame_patches([(1, frame, 1)], cfg.model),
    )
