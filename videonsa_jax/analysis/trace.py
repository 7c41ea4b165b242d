"""Runs a model layer by layer, so that what a layer decides can be looked at."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
from flax import nnx

from pallas_kernels import BlockSet
from videonsa_jax.batch import Batch
from videonsa_jax.config.schema import ComputeConfig
from videonsa_jax.errors import UserError
from videonsa_jax.model.attention import AttentionMetadata, Streams
from videonsa_jax.model.model import VideoNSA
from videonsa_jax.model.nsa import selected_blocks


class Decisions(NamedTuple):
    """What one layer's sparse attention chose for the vision queries."""

    gates: jax.Array  # f32[b r n 3], branches in the order of `gates.BRANCHES`
    blocks: BlockSet  # u32[b r k .] bits


def layers(model: VideoNSA, batch: Batch) -> Iterator[Decisions]:
    """Yields each decoder layer's decisions, from the first layer on.

    Raises:
      UserError: the model's attention is not the paper's.
    """
    if (mode := model.cfg.attention) != "paper":
        raise UserError(
            f"model.attention={mode!r} does not select blocks of vision tokens as the paper does; "
            "use --config.model.attention=paper"
        )
    graphdef, params = nnx.split(model)
    x, metadata = _begin(graphdef, params, batch)
    layer_graphdef, stacked = nnx.split(model.text.layers)
    for index in range(model.cfg.text.num_layers):
        layer = jax.tree.map(lambda stack, index=index: stack[index], stacked)
        x, decisions = _layer(layer_graphdef, layer, x, metadata, model.compute)
        yield decisions


@functools.partial(jax.jit, static_argnums=0)
def _begin(graphdef, params, batch: Batch) -> tuple[Streams, AttentionMetadata]:
    model = nnx.merge(graphdef, params)
    return model.text.embedded(model.vision(batch), batch), model.text.metadata(batch, None)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _layer(
    graphdef, params, x: Streams, metadata: AttentionMetadata, compute: ComputeConfig
) -> tuple[Streams, Decisions]:
    layer = nnx.merge(graphdef, params)
    normed = jax.tree.map(layer.attn_norm, x)
    queries, keys, _ = layer.attn.project(normed, metadata.angles)
    blocks = selected_blocks(
        queries.vision,
        keys.vision,
        segments=metadata.vision_segment,
        cfg=layer.cfg,
        implementation=compute.implementation,
    )
    gates = layer.gates(normed.vision)
    x, _ = layer(x, metadata, None, 0, compute)
    return x, Decisions(gates, blocks)
