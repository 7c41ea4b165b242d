"""What the GPU kernels over unions of blocks share: tiles, rows, the loop over blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes import triton as block_sizes
from pallas_kernels.block_sparse import kv_lists
from pallas_kernels.compat import pl, plgpu


@dataclasses.dataclass(frozen=True)
class TileDims:
    """Tiles of `block_q` queries x `padded_group` heads, over blocks of `block` keys."""

    block_q: int
    padded_group: int
    block: int


@dataclasses.dataclass(frozen=True)
class Tile:
    """The rows of one program.

    Attributes:
      at: row of the batch, KV head and tile.
      where: row of the batch, query i32[m] and head i32[m].
      rank: i32[m] number of the query in the tile.
      real: bool[m]: the query and the head exist.
      limits: i32[m] last key that the query may see; -1 for none, or where not real.
    """

    at: tuple
    where: tuple
    rank: jax.Array
    real: jax.Array
    limits: jax.Array

    @property
    def live(self):
        """bool[m]: the row exists and may see keys."""
        return self.limits >= 0


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch: a program per tile, KV head and row of the batch.

    Attributes:
      sizes: `TuningConfig`.
      dims: how queries are cut into tiles.
      grid: programs per axis.
      schedule: the first five inputs of the kernel.
    """

    sizes: block_sizes.TuningConfig
    dims: TileDims
    grid: tuple[int, int, int]
    schedule: tuple[jax.Array, ...]

    @classmethod
    def of(cls, kernel: str, q, k, sees) -> "Launch":
        """Plans `kernel`, a name in `block_sizes.triton`, for q, k and `ChosenKeys`."""
        b, s, n, h = q.shape
        t, heads = k.shape[1:3]
        padded = pl.next_power_of_2(n // heads)
        sizes = block_sizes.pick(kernel, compat.device_kind(), q.dtype, h)
        block_q = max(min(sizes.block_q // padded, kv_lists.MOST_QUERIES), 1)
        limit = jnp.minimum(sees.pos, t - 1)
        lists = kv_lists.build(sees.blocks, limit, block_q=block_q, keys=t)
        schedule = lists.ids, lists.members, lists.num_full, lists.count, limit
        dims = TileDims(block_q, padded, sees.blocks.block)
        return cls(sizes, dims, (-(-s // block_q), heads, b), schedule)

    def kernel(self, body, name, *, out_shape, interpret):
        """A function of the inputs after the schedule; `body` takes all refs, and `dims`."""
        run = compat.triton_call(
            functools.partial(body, dims=self.dims),
            grid=self.grid,
            out_shape=out_shape,
            num_warps=self.sizes.num_warps,
            num_stages=self.sizes.num_stages,
            interpret=interpret,
            name=name,
        )
        return functools.partial(run, *self.schedule)


def tile_of(schedule, q, k, dims) -> Tile:
    """The rows of this program, of which `schedule` is the first refs."""
    limit = schedule[4]
    tile, head, row = (pl.program_id(axis) for axis in range(3))
    m = dims.block_q * dims.padded_group
    rank, member = jnp.arange(m) // dims.padded_group, jnp.arange(m) % dims.padded_group
    group = q.shape[2] // k.shape[2]
    where = row, tile * dims.block_q + rank, head * group + member
    real = (member < group) & (where[1] < q.shape[1])
    limits = plgpu.load(limit.at[where[:2]], mask=real, other=-1)
    return Tile((row, head, tile), where, rank, real, limits)


def kv_loop(schedule, tile, k, v, dims, step, state):
    """Folds step(state, keys [w h], values [w h], see bool[m w or 1]) over a tile's blocks."""
    ids, members, num_full, count, _ = schedule
    row, head, _ = tile.at

    def visit(j, state, *, is_partial):
        begin = ids[(*tile.at, j)] * dims.block
        here = (row, pl.ds(begin, dims.block), head, slice(None))
        see = (((members[(*tile.at, j)] >> tile.rank) & 1) == 1)[:, None]
        if is_partial:
            key = begin + jnp.arange(dims.block)
            see &= key[None] <= tile.limits[:, None]
            seen = see.astype(jnp.int32).max(0)[:, None] > 0  # a key that no row sees may hold NaN
            keys, values = (plgpu.load(x.at[here], mask=seen, other=0) for x in (k, v))
        else:
            keys, values = (plgpu.load(x.at[here]) for x in (k, v))
        return step(state, keys, values, see)

    fulls = num_full[tile.at]
    state = jax.lax.fori_loop(0, fulls, functools.partial(visit, is_partial=False), state)
    return jax.lax.fori_loop(
        fulls, count[tile.at], functools.partial(visit, is_partial=True), state
    )


def load_rows(ref, where, mask):
    """Rows [m h] of a [b s n h] array; 0 where bool[m] `mask` is False."""
    return plgpu.load(rows_of(ref, where), mask=mask[:, None], other=0)


def rows_of(ref, where):
    """A view of rows [m h] of a [b s n h] array, by three indices; the second is i32[m]."""
    row, query, head = where
    head = head[:, None] if jnp.ndim(head) else head
    return ref.at[row, query[:, None], head, jnp.arange(ref.shape[3])[None]]
