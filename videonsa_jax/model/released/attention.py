"""The attention layer of the released code: sparse and dense attention added to each other.

Sparse attention runs over the whole prompt. There text is a query, key and value of zero: it counts
in every softmax, and attends by plain means. Dense attention runs over the whole prompt as well,
with a query of zero for vision, which makes it the mean of all values so far.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import (
    BlockSet,
    block_mean,
    compressed_attention,
    selected_attention,
    window_attention,
)
from videonsa_jax.config.schema import ModelConfig
from videonsa_jax.model.attention import AttentionMetadata, Streams, dense_over
from videonsa_jax.model.released import means, selection
from videonsa_jax.model.released.heads import Heads
from videonsa_jax.model.released.layout import Layout, in_order, take


class Keys(NamedTuple):
    """What the sparse branches attend to, in slot order; text is zero."""

    k: jax.Array  # f[b l k h]
    v: jax.Array  # f[b l k h]
    mean_k: jax.Array  # f[b c k h] of the slots in use of each block
    mean_v: jax.Array  # f[b c k h]


def attend(
    queries: Streams,
    keys: Streams,
    values: Streams,
    *,
    cached_kv: tuple[jax.Array, jax.Array],
    gates: jax.Array,
    metadata: AttentionMetadata,
    cfg: ModelConfig,
    implementation: str | None,
) -> Streams:
    """As `videonsa_jax.model.attention.attend`, with `metadata.layout` and one sequence per row.

    A step without vision tokens, so each step of decoding, is dense attention alone.
    """

    dense = dense_over(cached_kv, metadata, implementation)
    text = dense(queries.text, metadata.order.text, metadata.start.text)
    seen = queries.vision.shape[1]
    if seen == 0:
        return Streams(queries.vision, text)
    layout, switches = metadata.layout, cfg.released
    is_vision = layout.vision[:, :seen, None, None]
    sparse = Sparse(sparse_keys(keys, values, layout, cfg), layout, cfg, implementation)
    scored = sparse.score(queries.vision)
    vision, sparse_text = sparse.vision(scored, gates), sparse.text(scored)
    if not switches.sparse_on_text:
        vision, sparse_text = jnp.where(is_vision, vision, 0), jnp.zeros_like(text)
    if switches.mean_on_vision:
        mean = means.so_far(values.joined(), layout.rank, layout.rank[:, :seen], queries.vision)
        vision += jnp.where(is_vision, mean, 0)
    if switches.split_by_positions:
        order = jnp.where(layout.vision[:, :seen], -1, metadata.order.vision)
        vision += _few(dense, queries.vision, order, metadata.start.vision)
    return Streams(vision, text + sparse_text)


def _few(dense, queries: jax.Array, order: jax.Array, start: jax.Array) -> jax.Array:
    """Dense attention of the queries with an order; the others, order -1, cost no attention.

    They are moved behind the few, so that most tiles of queries are empty.
    """
    rows = jnp.argsort(order < 0, axis=1, stable=True)
    out = dense(take(queries, rows), take(order, rows), take(start, rows))
    return take(out, jnp.argsort(rows, axis=1))


def sparse_keys(keys: Streams, values: Streams, layout: Layout, cfg: ModelConfig) -> Keys:
    """Keys and values f[b . k h] of vision in slot order, else zeros, and their block means."""
    block, slots = cfg.nsa.block_size, layout.token.shape[1]
    vision = layout.vision[..., None, None]
    k, v = (in_order(jnp.where(vision, x.joined(), 0), layout.slot, slots) for x in (keys, values))
    begin = jnp.arange(0, slots, block)
    used = jnp.minimum(layout.stop[:, None], begin + block) - jnp.maximum(
        layout.first[:, None], begin
    )
    whole = (block / jnp.maximum(used, 1))[..., None, None]  # a mean is over the slots in use
    mean_k, mean_v = (
        (block_mean(x, block=block).astype(jnp.float32) * whole).astype(x.dtype) for x in (k, v)
    )
    return Keys(k, v, mean_k, mean_v)


class Scored(NamedTuple):
    """What follows from the compressed branch of the vision stream."""

    q: jax.Array  # f[b r p h] queries by head slot, zero at text
    compressed: jax.Array  # f[b r p h]
    lse: jax.Array  # f32[b l p] of every slot of the sequence
    blocks: BlockSet  # of each query


class Sparse:
    """The three branches of one layer: for the vision stream in full, for text in closed form."""

    def __init__(self, keys: Keys, layout: Layout, cfg: ModelConfig, implementation: str | None):
        self.keys, self.layout, self.cfg = keys, layout, cfg
        self.implementation = implementation
        query, kv = cfg.text.num_heads, cfg.text.num_kv_heads
        self.heads = Heads(query, kv, cfg.released.two_copies)

    def score(self, queries: jax.Array) -> Scored:
        """Compressed attention of the vision stream f[b r n h], and the blocks it ranks highest."""
        seen = queries.shape[1]
        slot, vision = self.layout.slot[:, :seen], self.layout.vision[:, :seen]
        q = self.heads.spread(jnp.where(vision[..., None, None], queries, 0))
        compressed, lse = compressed_attention(
            q,
            self.keys.mean_k,
            self.keys.mean_v,
            selection.compressed_range(slot, self.layout, self.cfg),
            scale=q.shape[-1] ** -0.5,
            implementation=self.implementation,
        )
        table = selection.lse_of_all(lse, slot, self.layout, self.cfg)
        return Scored(q, compressed, table, self._choose(q, table, slot))

    def vision(self, scored: Scored, gates: jax.Array) -> jax.Array:
        """Gates f32[b r n 3] -> f[b r n h]; those that count as text have gates of a half."""
        seen = gates.shape[1]
        slot, vision = self.layout.slot[:, :seen], self.layout.vision[:, :seen]
        k, v = self.keys.k, self.keys.v
        how = {"scale": k.shape[-1] ** -0.5, "implementation": self.implementation}
        start = jnp.broadcast_to(self.layout.first[:, None], slot.shape)
        branches = (
            scored.compressed,
            selected_attention(scored.q, k, v, scored.blocks, slot, **how),
            window_attention(scored.q, k, v, start, slot, window=self.cfg.nsa.window_size, **how),
        )
        return self._combine(jnp.where(vision[..., None, None], gates, 0.5), branches, slot)

    def text(self, scored: Scored) -> jax.Array:
        """The text stream f[b s n h]: a query of zero attends by the mean of what it sees."""
        slot = self.layout.slot[:, scored.q.shape[1] :]
        zeros = jnp.zeros((*slot.shape, *scored.q.shape[2:]), scored.q.dtype)
        blocks, first = self._choose(zeros, scored.lse, slot), self.layout.first
        branches = (
            means.in_range(
                self.keys.mean_v, selection.compressed_range(slot, self.layout, self.cfg)
            ),
            means.in_blocks(self.keys.v, blocks, slot, first),
            means.in_window(self.keys.v, slot, first, self.cfg.nsa.window_size),
        )
        branches = tuple(self.heads.of_groups(x).astype(zeros.dtype) for x in branches)
        return self._combine(jnp.full((*slot.shape, self.heads.query, 3), 0.5), branches, slot)

    def _choose(self, q: jax.Array, lse: jax.Array, slot: jax.Array) -> BlockSet:
        return selection.choose(
            q, self.keys.mean_k, lse, slot, self.layout, self.cfg, self.implementation
        )

    def _combine(self, gates: jax.Array, branches: tuple, slot: jax.Array) -> jax.Array:
        """Gates [b s n 3], branches 3 x [b s p h] -> [b s n h]; 0 for a token without a slot."""
        gated = (
            gates[..., i, None] * self.heads.average(x.astype(jnp.float32))
            for i, x in enumerate(branches)
        )
        out = jnp.where((slot >= 0)[..., None, None], sum(gated), 0)
        return out.astype(branches[0].dtype)
