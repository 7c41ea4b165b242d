"""Which blocks the released sparse attention selects."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import BlockSet, SelectRule, select_blocks
from videonsa_jax.config.schema import ModelConfig
from videonsa_jax.model.released.layout import Layout, in_order, take
from videonsa_jax.model.released.topk import network_top

QUERIES = 128  # whose scores over all blocks exist at a time


def compressed_range(slot: jax.Array, layout: Layout, cfg: ModelConfig) -> jax.Array:
    """Slots i32[b s] -> i32[b s 2], the compressed blocks that each sees; none for slot -1."""
    size = cfg.nsa.block_size
    if cfg.released.future_blocks:
        blocks = jnp.broadcast_to(-(-layout.stop[:, None] // size), slot.shape)
        visible = jnp.stack([slot // size, blocks], axis=-1)
    else:
        visible = jnp.stack([jnp.zeros_like(slot), (slot + 1) // size], axis=-1)
    return jnp.where(slot[..., None] >= 0, visible, 0)


def lse_of_all(lse: jax.Array, slot: jax.Array, layout: Layout, cfg: ModelConfig) -> jax.Array:
    """Softmax denominators of the compressed branch for every slot of the sequence.

    Args:
      lse: f32[b r p] of the vision stream, by head slot.
      slot: i32[b r] its slots.
      layout: of the row.
      cfg: the block size and the switches.

    Returns:
      f32[b l p]. Text has a query of zero, so its denominator is the number of blocks it sees.
    """
    every = jnp.arange(layout.token.shape[1], dtype=jnp.int32)
    every = jnp.broadcast_to(every, layout.token.shape)
    low, high = jnp.moveaxis(compressed_range(every, layout, cfg), -1, 0)
    count = jnp.log(jnp.maximum(high - low, 1).astype(jnp.float32))
    known = in_order(jnp.ones_like(slot, bool), slot, every.shape[1])
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
    return jnp.where(known[..., None], in_order(lse, slot, every.shape[1]), count[..., None])


def choose(
    q: jax.Array,
    mean_k: jax.Array,
    table: jax.Array,
    slot: jax.Array,
    layout: Layout,
    cfg: ModelConfig,
    implementation: str | None,
) -> BlockSet:
    """The blocks of each query.

    Args:
      q: f[b s p h] queries by head slot.
      mean_k: f[b c k h] block means of the keys.
      table: f32[b l p] from `lse_of_all`.
      slot: i32[b s] where the queries stand; -1 chooses nothing.
      layout: of the row.
      cfg: the block size, the block count and the switches.
      implementation: see `pallas_kernels`; the network has one only.
    """
    q, mean_k, table = jax.lax.stop_gradient((q, mean_k, table))
    own = jnp.where(slot < 0, -1, slot // cfg.nsa.block_size)
    lse = _scaling(table, slot, layout, cfg.released.transposed_lse)
    scale = q.shape[-1] ** -0.5
    if cfg.released.network_topk:
        return _by_network(q, mean_k, lse, own, scale, cfg)
    rule = SelectRule(
        cfg.nsa.block_count, num_init_blocks=0, num_local_blocks=1, block=cfg.nsa.block_size
    )
    past = jnp.stack([jnp.zeros_like(own), own], axis=-1)
    return select_blocks(
        q, mean_k, lse, past, own, rule=rule, scale=scale, implementation=implementation
    )


def _scaling(table: jax.Array, slot: jax.Array, layout: Layout, transposed: bool) -> jax.Array:
    """f32[b l p] -> f32[b s p]: what the scores of the queries at `slot` are divided by, as logs.

    The kernel that scores takes the table for [sequence, heads]; it lies in memory as [heads,
    sequence]. So entry (i, p) of a row of L tokens is that of head slot r // L at token r % L, with
    r = i x heads + p.
    """
    if not transposed:
        return take(table, slot)
    heads, first = table.shape[-1], layout.first[:, None, None]
    length = jnp.maximum(layout.stop - layout.first, 1)[:, None, None]
    place = (slot - layout.first[:, None])[..., None] * heads + jnp.arange(heads)
    flat = (first + place % length) * heads + place // length
    at = jnp.where(slot[..., None] < 0, 0, flat)
    return take(table.reshape(table.shape[0], -1), at)


def _by_network(q, mean_k, lse, own, scale, cfg: ModelConfig) -> BlockSet:
    """Scores and the network's choice, some queries at a time."""
    b, s, p, h = q.shape
    c, k = mean_k.shape[1:3]
    queries = min(QUERIES, s)

    def pieces(x, fill):
        widths = [(0, 0), (0, -s % queries)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(x.reshape(b, -1, queries, *x.shape[2:]), 1, 0)

    def choose(piece):
        q, lse, own = piece
        logits = jnp.einsum(
            "bmkgh,bckh->bmkgc",
            q.reshape(b, queries, k, p // k, h),
            mean_k,
            precision="highest",
            preferred_element_type=jnp.float32,
        )
        weights = jnp.exp(logits * scale - lse.reshape(b, queries, k, p // k, 1))
        # The released kernel overflows to NaN here; an infinite score sorts as the largest.
        scores = jnp.minimum(weights.sum(3), jnp.finfo(jnp.float32).max)
        own = jnp.broadcast_to(own[..., None], (b, queries, k))
        scores = jnp.where(jnp.arange(c) == own[..., None], float(p // k), scores)
        chosen = network_top(scores, own, cfg.nsa.block_count)
        return BlockSet.of_ids(chosen, c, cfg.nsa.block_size)

    blocks = jax.lax.map(choose, (pieces(q, 0), pieces(lse, 0), pieces(own, -1)))
    bits = jnp.moveaxis(blocks.bits, 0, 1)
    return dataclasses.replace(blocks, bits=bits.reshape(b, -1, *bits.shape[3:])[:, :s])
