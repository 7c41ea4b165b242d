"""What the forward and the backward kernels of attention under a `KeyRangeMask` share on GPUs."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes import triton as block_sizes
from pallas_kernels.compat import pl, plgpu

LEAST_ROWS = 16  # of a matrix product
LEAST_VISITS = 4  # tiles that are worth a program of their own


def tuning(kernel, q):
    """The `TuningConfig` for q [b s n h] on this device.

    Args:
      kernel: a name in `block_sizes.triton`: that of the operation, or for few queries
        "decode_attention", or in the backward pass "attention_dq" or "attention_dkv".
      q: the queries.
    """
    width = pl.next_power_of_2(q.shape[3])
    return block_sizes.pick(kernel, compat.device_kind(), q.dtype, width)


def per_tile(x, count, fill):
    """Appends `fill` to the last axis of x up to `count` numbers."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count - x.shape[-1])], constant_values=fill)


def tile_loop(schedule, steps, state, *, split=0, num_splits=1, repeat=1):
    """Visits the tiles of a program's schedule: the full ones first, then the partial ones.

    Args:
      schedule: refs of the ranges [4] and, where tiles are listed, of the ids.
      steps: two functions of the number of a tile, the repetition and the state, that return the
        new state: one for full tiles, one for partial ones.
      state: before the first step.
      split: which share of the visits to make.
      num_splits: programs that share the visits.
      repeat: visits per tile.
    """
    ranges, *ids = schedule
    begin, full_begin, full_end, end = (ranges[i] for i in range(4))
    fulls = full_end - full_begin

    def number(place):
        return ids[0][place] if ids else place

    def visit(i, state, *, is_full):
        i, turn = jax.lax.div(i, repeat), jax.lax.rem(i, repeat)
        if is_full:
            return steps[0](number(full_begin + i), turn, state)
        place = begin + i
        return steps[1](number(place + jnp.where(place >= full_begin, fulls, 0)), turn, state)

    for count, is_full in ((fulls, True), (end - begin - fulls, False)):
        low, high = (jax.lax.div(count * repeat * x, num_splits) for x in (split, split + 1))
        state = jax.lax.fori_loop(low, high, functools.partial(visit, is_full=is_full), state)
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
