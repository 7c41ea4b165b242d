"""What the TPU kernels over unions of blocks share: dimensions, inputs, the loop over blocks.

Matrices of logits have keys on sublanes and rows on lanes. A row is a query of the tile with one
head of the group, head by head; rows are filled up to whole registers of lanes. So what belongs to
a row (its maximum, its lse, its last key) is one register wide, and no mask is ever transposed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes import tpu as block_sizes
from pallas_kernels.block_sizes import tpu_vmem
from pallas_kernels.block_sizes.tpu import LANES
from pallas_kernels.block_sparse import kv_lists
from pallas_kernels.block_sparse.block_set import WORD
from pallas_kernels.compat import pl, pltpu
from pallas_kernels.tpu_layout import head_lanes, kept

MOST_ROWS = 256  # per tile, where a tile of the fewest queries does not have more
LEAST_QUERIES = 16  # per tile: a register of two-byte values holds 16 sublanes


@dataclasses.dataclass(frozen=True)
class TileDims:
    """How the work is cut.

    Attributes:
      block_q: queries per tile.
      group: query heads per KV head.
      lanes: rows of a tile, filled up.
      block: keys per block.
      blocks_per_step: blocks that are visited together.
      span: keys per range, of which the keys and values are in VMEM at a time; whole blocks.
      ranges: of keys.
    """

    block_q: int
    group: int
    lanes: int
    block: int
    blocks_per_step: int
    span: int
    ranges: int

    @classmethod
    def of(cls, q, k, block, *, backward):
        """For arguments as in `api.py` on the device that code is traced for.

        Raises:
          ValueError: there are more keys than the kernels take.
        """
        why = tpu_vmem.keys_unsupported_reason(k.shape[1], k.dtype, block, backward=backward)
        if why is not None:
            raise ValueError(why)
        t, heads = k.shape[1:3]
        sizes = block_sizes.pick(compat.device_kind())
        group = q.shape[2] // heads
        most = MOST_ROWS // group // LEAST_QUERIES * LEAST_QUERIES
        block_q = min(sizes.selected_block_q, max(most, LEAST_QUERIES))
        lanes = -(-block_q * group // LANES) * LANES
        blocks = -(-t // block)
        fit = tpu_vmem.keys_per_range(k.dtype, block, backward=backward) // block
        ranges = -(-blocks // fit)
        span = -(-blocks // ranges) * block
        return cls(block_q, group, lanes, block, sizes.blocks_per_step, span, ranges)


@dataclasses.dataclass(frozen=True)
class BlockSchedule:
    """Per tile: its list of blocks, where each range of keys lies in it, and who chose what.

    Attributes:
      ids: i32[b k tiles 1 u] as in `KVBlockLists`.
      bounds: per range, i32[b k tiles 1 3] the first slot of the range, the end of those that
        need no comparison of positions, the end of the range.
      limits: i32[b tiles 1 lanes] last key that a row may see, -1 for none.
      bits: i32[b k words s'] words of `BlockSet`; the queries are filled up to whole registers.
    """

    ids: jax.Array
    bounds: tuple[jax.Array, ...]
    limits: jax.Array
    bits: jax.Array

    @classmethod
    def plan(cls, dims, sees, t):
        """For `ChosenKeys` of t keys."""
        blocks, limit = sees.blocks, jnp.minimum(sees.pos, t - 1)
        lists = kv_lists.build(blocks, limit, block_q=dims.block_q, keys=t, with_members=False)
        used = jnp.arange(lists.ids.shape[-1]) < lists.count[..., None]
        bounds, first = [], jnp.zeros_like(lists.count)
        for i in range(dims.ranges):
            end = (i + 1) * (dims.span // dims.block)
            last = (used & (lists.ids < end)).sum(-1, dtype=jnp.int32)
            full = jnp.clip(lists.num_full, first, last)
            bounds.append(jnp.stack([first, full, last], axis=-1)[..., None, :])
            first = last
        limits = jnp.broadcast_to(limit[..., None], (*limit.shape, dims.group))
        limits = rows_of(limits, dims, 1, fill=-1)[:, 0]
        bits = jax.lax.bitcast_convert_type(blocks.bits, jnp.int32).transpose(0, 2, 3, 1)
        bits = jnp.pad(bits, [(0, 0)] * 3 + [(0, -bits.shape[3] % LANES)])
        return cls(lists.ids[..., None, :], tuple(bounds), limits, bits)

    def inputs(self, dims, i):
        """The first four inputs of a kernel on range `i`, and their specs."""
        lists = self.ids, self.bounds[i]
        specs = [
            pl.BlockSpec(
                (None, None, None, 1, x.shape[-1]),
                lambda b, k, tile: (b, k, tile, 0, 0),
                memory_space=pltpu.SMEM,
            )
            for x in lists
        ]
        limits = pl.BlockSpec((None, None, 1, dims.lanes), lambda b, k, tile: (b, tile, 0, 0))
        bits = pl.BlockSpec(
            (None, None, self.bits.shape[2], LANES),
            lambda b, k, tile: (b, k, 0, tile // (LANES // dims.block_q)),
        )
        return (*lists, self.limits, self.bits), [*specs, limits, bits]

    def scratch(self, dims):
        """What `kv_loop` needs: the words of each row."""
        return pltpu.VMEM((self.bits.shape[2], dims.lanes), jnp.int32)


def rows_of(x, dims, heads, fill=0):
    """[b s n] -> [b k tiles 1 lanes]: a number per row."""
    b, s, _ = x.shape
    x = jnp.pad(x, ((0, 0), (0, -s % dims.block_q), (0, 0)), constant_values=fill)
    x = x.reshape(b, -1, dims.block_q, heads, dims.group).transpose(0, 3, 1, 4, 2)
    x = x.reshape(b, heads, -1, 1, dims.group * dims.block_q)
    widths = [(0, 0)] * 4 + [(0, dims.lanes - x.shape[-1])]
    return jnp.pad(x, widths, constant_values=fill)


def heads_of(x, dims, s):
    """[b k tiles 1 lanes] -> [b s n]: the inverse of `rows_of`."""
    b, heads, tiles = x.shape[:3]
    x = x[..., 0, : dims.group * dims.block_q]
    x = x.reshape(b, heads, tiles, dims.group, dims.block_q).transpose(0, 2, 4, 1, 3)
    return x.reshape(b, tiles * dims.block_q, -1)[:, :s]


def unflat(x, shape):
    """[b s' n*LANES] -> [b s n h]: the inverse of `flat`."""
    b, s, n, h = shape
    return x.reshape(b, -1, n, LANES)[:, :s, :, :h]


def query_spec(dims):
    """Of a tile of `flat` queries."""
    return pl.BlockSpec((None, dims.block_q, dims.group * LANES), lambda b, k, tile: (b, tile, k))


def row_spec(dims):
    """Of a tile of `rows_of`."""
    return pl.BlockSpec((None, None, None, 1, dims.lanes), lambda b, k, tile: (b, k, tile, 0, 0))


def key_spec(dims, i):
    """Of range `i` of `flat` keys of one head: it stays in VMEM, once, for all tiles."""
    return pl.BlockSpec(
        (None, dims.span, LANES), lambda b, k, tile: (b, i, k), pipeline_mode=pl.Buffered(1)
    )


def load_rows(ref, dims):
    """A tile of queries -> [lanes LANES], head by head, then zeros."""
    rows = [ref[:, head_lanes(g)] for g in range(dims.group)]
    if rest := dims.lanes - dims.group * dims.block_q:
        rows.append(jnp.zeros((rest, LANES), ref.dtype))
    return jnp.concatenate(rows, axis=0)


def store_rows(ref, rows, dims):
    """The inverse of `load_rows`; rounds to the dtype of the reference."""
    for g in range(dims.group):
        head = rows[g * dims.block_q : (g + 1) * dims.block_q]
        ref[:, head_lanes(g)] = head.astype(ref.dtype)


def kv_loop(schedule, words, k, v, dims, begin, step, state):
    """Folds step(state, keys [w LANES], values [w LANES], see bool[w lanes], places) over blocks.

    Args:
      schedule: refs of the ids, bounds, limits and bits of a tile.
      words: ref of `BlockSchedule.scratch`.
      k: ref of the keys of a range [span LANES].
      v: ref of the values of a range [span LANES].
      dims: `TileDims`.
      begin: number of the first block of the range.
      step: takes some blocks at a time; a block may come twice, and is then seen once. `places` are
        the first keys of the blocks in the range.
      state: before the first step.
    """
    ids, bounds, limits, bits = schedule
    words[...] = _words(bits[...], dims)
    limit = limits[...]
    live = (limit >= 0).astype(jnp.int32)
    key = jax.lax.broadcasted_iota(jnp.int32, (dims.block, 1), 0)

    def visit(j, state, *, first, last, is_partial):
        places, see = [], []
        for i in range(dims.blocks_per_step):
            slot = first + j * dims.blocks_per_step + i
            block = ids[0, jnp.minimum(slot, last - 1)]
            place = pl.multiple_of((block - begin) * dims.block, dims.block)
            chosen = (words[pl.ds(block // WORD, 1), :] >> (block % WORD)) & live
            chosen = jnp.where(slot < last, chosen, 0)
            chosen = jnp.broadcast_to(chosen, (dims.block, dims.lanes))
            if is_partial:
                chosen = jnp.where(block * dims.block + key <= limit, chosen, 0)
            places.append(place)
            see.append(chosen)
        keys, values = (
            jnp.concatenate([x[pl.ds(place, dims.block), :] for place in places]) for x in (k, v)
        )
        see = jnp.concatenate(see)
        if is_partial:  # a key that no row sees may hold NaN
            seen = see.max(1, keepdims=True) > 0
            keys, values = (kept(x, seen) for x in (keys, values))
        return step(state, keys, values, see > 0, places)

    first, full, last = bounds[0, 0], bounds[0, 1], bounds[0, 2]
    for begins, ends, is_partial in ((first, full, False), (full, last, True)):
        body = functools.partial(visit, first=begins, last=ends, is_partial=is_partial)
        steps = (ends - begins + dims.blocks_per_step - 1) // dims.blocks_per_step
        state = jax.lax.fori_loop(0, steps, body, state)
    return state


def _words(bits, dims):
    """i32[words LANES] of the queries around a tile -> i32[words lanes] of its rows."""
    here = pl.program_id(2) % (LANES // dims.block_q) * dims.block_q
    bits = pltpu.roll(bits, (LANES - here) % LANES, axis=1)
    lane = jax.lax.broadcasted_iota(jnp.int32, bits.shape, 1)
    bits = jnp.where(lane < dims.block_q, bits, 0)
    size = dims.block_q
    while size < LANES:
        bits |= pltpu.roll(bits, size, axis=1)
        size *= 2
    return jnp.concatenate([bits] * (dims.lanes // LANES), axis=1)
