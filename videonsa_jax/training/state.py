"""What a run carries from step to step, and how it is born sharded."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util
from jax.sharding import AbstractMesh, Mesh

from videonsa_jax.config.run import RunConfig
from videonsa_jax.model.model import VideoNSA
from videonsa_jax.sharding import shard
from videonsa_jax.sharding.shard import ParamLayout
from videonsa_jax.training.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters are float32; the model casts them to its compute dtype."""

    step: jax.Array  # i32[] batches consumed, skipped ones included
    skipped: jax.Array  # i32[] batches whose loss or gradient was not finite
    consecutive_bad: jax.Array  # i32[] how many of them came last in a row
    params: dict[str, Any]  # nested, as `nnx.to_pure_dict` gives them
    opt_state: optax.OptState  # of the flat trained parameters


jax.tree_util.register_dataclass(
    TrainState, data_fields=[f.name for f in dataclasses.fields(TrainState)], meta_fields=[]
)


def build_model(cfg: RunConfig) -> VideoNSA:
    """The model with random parameters drawn from the run's seed."""
    return VideoNSA(cfg.model, compute=cfg.compute, rules=cfg.sharding, rngs=nnx.Rngs(cfg.seed))


def abstract_model(
    cfg: RunConfig, mesh: Mesh | AbstractMesh
) -> tuple[nnx.GraphDef, list[ParamLayout]]:
    """The model's structure and its parameters' layouts; computes nothing.

    Raises:
      UserError: the mesh cannot split the parameters, or the rows of the config's buckets.
    """
    shard.check_rows(cfg.data.buckets, cfg.model.nsa.block_size, cfg.sharding, mesh)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: build_model(cfg)))
    return graphdef, shard.param_layouts(params, cfg.sharding, mesh)


def abstract_state(layouts: list[ParamLayout], optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Shapes and shardings of a state: optimizer moments lie where their parameters lie."""
    whole = shard.replicated(mesh)
    homes = {layout.path: layout.sharding for layout in layouts}
    params = traverse_util.unflatten_dict({x.path: x.abstract for x in layouts}, sep="/")
    trained, _ = optimizer.split(params)

    def place(keys, x):  # a moment's last key is the path of its parameter
        path = getattr(keys[-1], "key", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=homes.get(path, whole))

    opt_state = jax.tree_util.tree_map_with_path(
        place, jax.eval_shape(optimizer.transformation().init, trained)
    )
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(count, count, count, params, opt_state)


def shardings(abstract: TrainState) -> TrainState:
    """The shardings of `abstract_state`, for `out_shardings`."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def initial_state(
    cfg: RunConfig, optimizer: Optimizer, abstract: TrainState, params: dict | None = None
) -> TrainState:
    """A state at step 0, each device computing only its part.

    Args:
      cfg: the model and the seed.
      optimizer: its state starts at zero.
      abstract: from `abstract_state`.
      params: starting weights, nested and already sharded; what they lack is drawn. None draws all.
    """

    def init(given):
        params = nnx.to_pure_dict(nnx.state(build_model(cfg), nnx.Param))
        flat, given = (traverse_util.flatten_dict(x, sep="/") for x in (params, given))
        params = traverse_util.unflatten_dict(flat | given, sep="/")
        trained, _ = optimizer.split(params)
        opt_state = optimizer.transformation().init(trained)
        return TrainState(jnp.int32(0), jnp.int32(0), jnp.int32(0), params, opt_state)

    return jax.jit(init, out_shardings=shardings(abstract), donate_argnums=0)(params or {})
