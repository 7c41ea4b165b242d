"""Grouped-query attention over two streams: vision tokens and text tokens of the same sequences.

Query head i reads KV head i // g, g = query heads per KV head.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import dense_attention
from videonsa_jax.config.schema import LoRAConfig, ModelConfig, TextConfig
from videonsa_jax.model.layers import Adapter, Linear
from videonsa_jax.model.rope import rotate


class Streams(NamedTuple):
    """The same quantity for the vision tokens [b r ...] and for the text tokens [b s ...]."""

    vision: jax.Array
    text: jax.Array

    def joined(self) -> jax.Array:
        """[b r+s ...]."""
        return jnp.concatenate(self, axis=1)


@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """Where the tokens are, the same for all layers."""

    angles: Streams  # f32[b . h/2] rotary angles
    order: Streams  # i32[b .] index in the row; -1 at padding
    start: Streams  # i32[b .] order of the sequence's first token
    vision_segment: jax.Array  # i32[b r]; -1 at padding
    key_order: jax.Array  # i32[b t] order of every key; -1 where there is none
    layout: Any = None  # [b ...] what else the mode of attention needs, see `AttentionMode`


jax.tree_util.register_dataclass(
    AttentionMetadata,
    data_fields=[field.name for field in dataclasses.fields(AttentionMetadata)],
    meta_fields=[],
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
    cached_kv: tuple[jax.Array, jax.Array],
    gates: jax.Array | None,
    metadata: AttentionMetadata,
    cfg: ModelConfig,
    implementation: str | None,
) -> Streams:
    """Dense: text and vision attend to everything before them.

    Args:
      queries: f[b . n h].
      keys: f[b . k h] of the tokens at hand.
      values: f[b . k h].
      cached_kv: keys and values f[b t k h] that dense attention sees, in the order of
        `metadata.key_order`: those at hand and, in decoding, all earlier ones.
      gates: f32[b r n 3] of the branches of sparse attention; None in modes without gates.
      metadata: order, start and segment of every token.
      cfg: sizes of the model.
      implementation: see `pallas_kernels`.

    Returns:
      f[b . n h].
    """
    del keys, values, gates, cfg
    dense = dense_over(cached_kv, metadata, implementation)
    text = dense(queries.text, metadata.order.text, metadata.start.text)
    if queries.vision.shape[1] == 0:
        return Streams(queries.vision, text)
    return Streams(dense(queries.vision, metadata.order.vision, metadata.start.vision), text)


def dense_over(
    cached_kv: tuple[jax.Array, jax.Array], metadata: AttentionMetadata, implementation: str | None
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Attention of queries f[b s n h] with order and start i32[b s] over all of `cached_kv`.

    The arguments are those of `attend`.
    """

    def dense(queries, order, start):
        return dense_attention(
            queries,
            *cached_kv,
            start=start,
            query_pos=order,
            key_pos=metadata.key_order,
            implementation=implementation,
        )

    return dense


def causal_pairs(tokens: int) -> float:
    """Query-key pairs where each of `tokens` sees itself and all before it."""
    return tokens * (tokens + 1) / 2
