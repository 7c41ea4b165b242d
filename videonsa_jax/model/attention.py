"""Grouped-query attention over two streams: vision tokens and text tokens of the same sequences.

Query head i reads KV head i // g, g = query heads per KV head.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import dense_attention
from videonsa_jax.config.schema import LoRAConfig, ModelConfig, TextConfig
from videonsa_jax.model.layers import Adapter, Linear
from videonsa_jax.model.nsa import vision_attention
from videonsa_jax.model.released.layout import Layout
from videonsa_jax.model.rope import rotate


class Streams(NamedTuple):
    """The same quantity for the vision tokens [b r ...] and for the text tokens [b s ...]."""

    vision: jax.Array
    text: jax.Array

    def joined(self) -> jax.Array:
        """[b r+s ...]."""
        return jnp.concatenate(self, axis=1)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the tokens are, the same for all layers."""

    angles: Streams  # f32[b . h/2] rotary angles
    order: Streams  # i32[b .] index in the row; -1 at padding
    start: Streams  # i32[b .] order of the sequence's first token
    vision_segment: jax.Array  # i32[b r]; -1 at padding
    key_order: jax.Array  # i32[b t] order of every key; -1 where there is none
    released: Layout | None = None  # in released mode


jax.tree_util.register_dataclass(
    Places, data_fields=[f.name for f in dataclasses.fields(Places)], meta_fields=[]
)


class Attention(nnx.Module):
    """The projections, and which attention each stream uses."""

    def __init__(self, cfg: TextConfig, *, layers: int, lora: LoRAConfig, rngs: nnx.Rngs):
        width = (("embed", cfg.d_model),)
        query_heads = (("heads", cfg.num_heads), (None, cfg.head_dim))
        key_heads = (("kv_heads", cfg.num_kv_heads), (None, cfg.head_dim))

        def linear(inputs, outputs, name, *, bias=True):
            adapter = Adapter.of(lora, name)
            return Linear(inputs, outputs, bias=bias, layers=layers, adapter=adapter, rngs=rngs)

        self.q = linear(width, query_heads, "q")
        self.k = linear(width, key_heads, "k")
        self.v = linear(width, key_heads, "v")
        self.o = linear(query_heads, width, "o", bias=False)

    def project(self, x: Streams, angles: Streams) -> tuple[Streams, Streams, Streams]:
        """f[b . d] -> rotated queries f[b . n h], rotated keys and values f[b . k h]."""
        queries = jax.tree.map(lambda x, angle: rotate(self.q(x), angle), x, angles)
        keys = jax.tree.map(lambda x, angle: rotate(self.k(x), angle), x, angles)
        return queries, keys, jax.tree.map(self.v, x)


def attend(
    queries: Streams,
    keys: Streams,
    values: Streams,
    *,
    context: tuple[jax.Array, jax.Array],
    gates: jax.Array | None,
    places: Places,
    cfg: ModelConfig,
    implementation: str | None,
) -> Streams:
    """Text attends to everything before it; vision likewise, or sparsely to vision alone.

    Args:
      queries: f[b . n h].
      keys: f[b . k h] of the tokens at hand.
      values: f[b . k h].
      context: keys and values f[b t k h] that dense attention sees, in the order of
        `places.key_order`: those at hand and, in decoding, all earlier ones.
      gates: f32[b r n 3]; None in dense mode.
      places: order, start and segment of every token.
      cfg: the attention mode and the sizes of sparse attention.
      implementation: see `pallas_kernels`.

    Returns:
      f[b . n h].
    """

    dense = dense_over(context, places, implementation)
    text = dense(queries.text, places.order.text, places.start.text)
    if queries.vision.shape[1] == 0:
        return Streams(queries.vision, text)
    if gates is None:
        vision = dense(queries.vision, places.order.vision, places.start.vision)
    else:
        vision = vision_attention(
            queries.vision,
            keys.vision,
            values.vision,
            gates,
            segments=places.vision_segment,
            cfg=cfg,
            implementation=implementation,
        )
    return Streams(vision, text)


def dense_over(
    context: tuple[jax.Array, jax.Array], places: Places, implementation: str | None
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Attention of queries f[b s n h], with their order and start i32[b s], over all of `context`.

    The arguments are those of `attend`.
    """

    def dense(queries, order, start):
        return dense_attention(
            queries,
            *context,
            start=start,
            query_pos=order,
            key_pos=places.key_order,
            implementation=implementation,
        )

    return dense
