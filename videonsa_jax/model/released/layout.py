"""The sequence of slots that the released sparse attention runs over, and who stands where."""

import dataclasses

import jax
import jax.numpy as jnp

from videonsa_jax.config.schema import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the tokens of a row stand in its sparse sequence, the same for all layers.

    Tokens t are the vision stream followed by the text stream; slots l are in sequence order.

    Attributes:
      vision: bool[b t] the token counts as vision.
      rank: i32[b t] the token's place in its row; -1 at padding.
      slot: i32[b t] the token's place in the sparse sequence; -1: it has none.
      token: i32[b l] the token in each slot; -1: none.
      first: i32[b] the first slot in use; less than a block.
      stop: i32[b] one past the last slot in use.
    """

    vision: jax.Array
    rank: jax.Array
    slot: jax.Array
    token: jax.Array
    first: jax.Array
    stop: jax.Array


def plan(order: jax.Array, positions: jax.Array, vision_slots: int, cfg: ModelConfig) -> Layout:
    """Lays out rows of one sequence each.

    Args:
      order: i32[b t] index of each token in its row, vision stream first; -1 at padding.
      positions: i32[b t 3] rotary ids.
      vision_slots: how many of the t tokens are the vision stream.
      cfg: the switches and the block size.
    """
    switches, block = cfg.released, cfg.nsa.block_size
    present = order >= 0
    if switches.split_by_positions:
        vision = present & (positions != positions[..., :1]).any(-1)
    else:
        vision = present & (jnp.arange(order.shape[1]) < vision_slots)
    rank = jnp.where(present, order - _least(order, present)[:, None], -1)
    member = present if switches.text_as_zeros else vision
    place = _count_before(rank, member)
    # Slot and place differ by less than a block, so that the first vision token stands where a
    # block starts, or as far into one as it does in the prompt.
    leader = _least(place, vision)
    wanted = _least(rank, vision) if switches.absolute_blocks else 0
    first = jnp.where(vision.any(1), (wanted - leader) % block, 0)
    slot = jnp.where(member, place + first[:, None], -1)
    slots = -(-(order.shape[1] + block - 1) // block) * block
    return Layout(
        vision=vision,
        rank=rank,
        slot=slot,
        token=_inverse(slot, slots),
        first=first,
        stop=first + member.sum(1),
    )


def in_order(values: jax.Array, places: jax.Array, count: int) -> jax.Array:
    """Values [b t ...] of the tokens at places i32[b t] -> [b count ...]; 0 where there is none."""
    out = jnp.zeros((values.shape[0], count, *values.shape[2:]), values.dtype)
    places = jnp.where(places < 0, count, places)
    return jax.vmap(lambda out, at, x: out.at[at].set(x, mode="drop"))(out, places, values)


def take(values: jax.Array, places: jax.Array) -> jax.Array:
    """The inverse: values [b count ...] at places i32[b s] -> [b s ...]; place -1 takes any."""
    return jax.vmap(lambda x, at: x[at])(values, jnp.maximum(places, 0))


def _least(values: jax.Array, where: jax.Array) -> jax.Array:
    """i32[b t] -> i32[b], the least of some."""
    return jnp.where(where, values, jnp.iinfo(jnp.int32).max).min(1)


def _count_before(rank: jax.Array, member: jax.Array) -> jax.Array:
    """i32[b t]: how many members have a lower rank."""
    counted = in_order(member.astype(jnp.int32), rank, rank.shape[1])
    return take(jnp.cumsum(counted, axis=1) - counted, rank)


def _inverse(slot: jax.Array, slots: int) -> jax.Array:
    tokens = jnp.broadcast_to(jnp.arange(1, slot.shape[1] + 1, dtype=jnp.int32), slot.shape)
    return in_order(tokens, slot, slots) - 1
