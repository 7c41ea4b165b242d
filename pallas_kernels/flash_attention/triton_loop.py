"""What the forward and the backward kernels of attention under a `Sight` have in common."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes import triton as tiles
from pallas_kernels.compat import pl, plgpu

LEAST_ROWS = 16  # of a matrix product
LEAST_VISITS = 4  # tiles that are worth a program of their own


def sizes(kernel, q):
    """The `TileParams` for q [b s n h] on this device.

    Args:
      kernel: a name in `tiles`: that of the operation, or for few queries "decode_attention", or in
        the backward pass "attention_dq" or "attention_dkv".
      q: the queries.
    """
    return tiles.pick(kernel, compat.device_kind(), q.dtype, pl.next_power_of_2(q.shape[3]))


def per_tile(x, count, fill):
    """Appends `fill` to the last axis of x up to `count` numbers."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count - x.shape[-1])], constant_values=fill)


def walk(schedule, steps, state, *, split=0, splits=1, repeat=1):
    """Visits the tiles of a program's schedule: the whole ones first, then the others.

    Args:
      schedule: refs of the spans [4] and, where tiles are listed, of the ids.
      steps: two functions of the number of a tile, the repetition and the state, that return the
        new state: one for whole tiles, one for the others.
      state: before the first step.
      split: which part of the visits to make.
      splits: parts.
      repeat: visits per tile.
    """
    spans, *ids = schedule
    first, whole_first, whole_last, last = (spans[i] for i in range(4))
    wholes = whole_last - whole_first

    def number(place):
        return ids[0][place] if ids else place

    def visit(i, state, *, is_whole):
        i, turn = jax.lax.div(i, repeat), jax.lax.rem(i, repeat)
        if is_whole:
            return steps[0](number(whole_first + i), turn, state)
        place = first + i
        return steps[1](number(place + jnp.where(place >= whole_first, wholes, 0)), turn, state)

    for total, is_whole in ((wholes, True), (last - first - wholes, False)):
        begin, end = (jax.lax.div(total * repeat * x, splits) for x in (split, split + 1))
        state = jax.lax.fori_loop(begin, end, functools.partial(visit, is_whole=is_whole), state)
    return state


def load(ref, where, see, width):
    """Rows [m wide] of a ref [.. wide]; 0 beyond `width` columns and where bool[m] `see` is False.

    `where` indexes all axes but the last.
    """
    mask = None if see is None else see[:, None]
    if width != ref.shape[-1]:
        inside = (jnp.arange(ref.shape[-1]) < width)[None]
        mask = inside if mask is None else mask & inside
    return plgpu.load(ref.at[(*where, slice(None))], mask=mask, other=None if mask is None else 0)


def store(ref, rows, exists, width):
    """Writes rows [m wide] in the ref's dtype where bool[m] `exists`, up to `width` columns."""
    inside = exists[:, None] & (jnp.arange(rows.shape[1]) < width)[None]
    plgpu.store(ref, rows.astype(ref.dtype), mask=inside)
