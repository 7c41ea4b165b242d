"""What the forward and the backward kernels of attention under a `KeyRangeMask` share on TPUs.

Inside of the kernels logits lie with keys on sublanes and queries on lanes, [keys rows]: what is
known per query, such as the maximum of a softmax, is then a row of lanes, and reductions over keys
need no exchange between lanes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes import tpu as block_sizes
from pallas_kernels.block_sizes.tpu import LANES
from pallas_kernels.compat import pl, pltpu
from pallas_kernels.tpu_layout import flat

BUFFERS = 3  # tiles in memory: the one at work and those on their way


@dataclasses.dataclass(frozen=True)
class PipelineDims:
    """How one call is cut.

    Attributes:
      b: rows of the batch.
      heads: KV heads.
      group: query heads per KV head; in the kernels each has LANES values.
      s: queries.
      t: keys.
      block_q: queries of a tile.
      block_kv: keys of a tile.
      vmem: bytes that a kernel may take.
    """

    b: int
    heads: int
    group: int
    s: int
    t: int
    block_q: int
    block_kv: int
    vmem: int

    @classmethod
    def of(cls, q, k):
        """For q [b s n h] and k [b t k h] on this device."""
        b, s, n, _ = q.shape
        t, heads = k.shape[1:3]
        sizes = block_sizes.pick(compat.device_kind())
        block_q, block_kv = (
            min(size, -(-length // LANES) * LANES)
            for size, length in ((sizes.block_q, s), (sizes.block_kv, t))
        )
        return cls(b, heads, n // heads, s, t, block_q, block_kv, sizes.vmem)

    @property
    def tiles(self):
        """Tiles of queries."""
        return -(-self.s // self.block_q)

    @property
    def kv_tiles(self):
        """Tiles of keys."""
        return -(-self.t // self.block_kv)

    def queries(self, x):
        """[b s n h] -> [b tiles*block_q n*LANES], zeros where nothing was."""
        return flat(x, self.tiles * self.block_q)

    def all_keys(self, x):
        """[b t k h] -> [b kv_tiles*block_kv k*LANES]."""
        return flat(x, self.kv_tiles * self.block_kv)

    def unflat(self, x, like):
        """The inverse of `queries` or `all_keys`, in the shape and dtype of `like`."""
        b, length, n, h = like.shape
        return x.reshape(b, -1, n, LANES)[:, :length, :, :h].astype(like.dtype)

    def limits(self, lo, hi):
        """i32[b s], i32[b s] -> i32[b 2 tiles*block_q]; the queries that are added see nothing."""
        both = jnp.stack([jnp.maximum(lo, 0), hi], axis=1)
        return _fill_last(both, self.tiles * self.block_q, 0)

    def stats(self, x, fill):
        """f32[b s n] -> f32[b k g tiles*block_q]."""
        x = jnp.moveaxis(x, 1, 2).reshape(self.b, self.heads, self.group, self.s)
        return _fill_last(x, self.tiles * self.block_q, fill)

    def unstats(self, x):
        """The inverse of `stats`."""
        x = x[..., : self.s].reshape(self.b, self.heads * self.group, self.s)
        return jnp.moveaxis(x, 1, 2)

    def positions(self, key_pos):
        """i32[b t] -> i32[b 1 kv_tiles*block_kv]; the keys that are added are never seen."""
        return _fill_last(key_pos, self.kv_tiles * self.block_kv, -1)[:, None]


def schedule_inputs(schedule):
    """The arrays of a `TileSchedule` and the spec of each: a step reads its numbers as scalars."""
    specs = [
        pl.BlockSpec(
            (None, None, 1, x.shape[2]),
            lambda row, _, tile: (row, tile, 0, 0),
            memory_space=pltpu.SMEM,
        )
        for x in schedule.arrays
    ]
    return [x[:, :, None] for x in schedule.arrays], specs


def tile_loop(schedule, streams, semaphores, steps):
    """Visits the tiles of a step's schedule, first the full ones, and copies the next meanwhile.

    Args:
      schedule: refs of the ranges [1 4] and, where tiles are listed, of the ids [1 c].
      streams: pairs of a function that views a tile in HBM by its number, and a ref
        [BUFFERS ...] to copy it to.
      semaphores: DMA semaphores [len(streams) BUFFERS].
      steps: two functions of a buffer's index: one for full tiles, one for partial ones.
    """
    ranges, *ids = schedule
    first, full_begin, full_end, end = (ranges[0, i] for i in range(4))
    fulls, count = full_end - full_begin, end - first

    def number(i):
        place = first + i - fulls
        place += jnp.where(place >= full_begin, fulls, 0)
        place = jnp.where(i < fulls, full_begin + i, place)
        return ids[0][0, place] if ids else place

    def copies(i):
        tile, slot = number(i), jax.lax.rem(i, BUFFERS)
        return [
            pltpu.make_async_copy(view(tile), buffer.at[slot], semaphores.at[j, slot])
            for j, (view, buffer) in enumerate(streams)
        ]

    def begin(i):
        @pl.when(i < count)
        def _():
            for copy in copies(i):
                copy.start()

    for i in range(BUFFERS - 1):
        begin(i)

    def visit(i, step):
        begin(i + BUFFERS - 1)
        for copy in copies(i):
            copy.wait()
        step(jax.lax.rem(i, BUFFERS))

    for low, high, step in ((0, fulls, steps[0]), (fulls, count, steps[1])):
        jax.lax.fori_loop(low, high, lambda i, _, step=step: visit(i, step), None)


def key_streams(dims, arrays, buffers):
    """`tile_loop`'s streams of key tiles of this step's KV head: positions, keys and values."""
    row, lanes = pl.program_id(0), pl.ds(pl.multiple_of(pl.program_id(1) * LANES, LANES), LANES)
    key_pos, k, v = arrays

    def places(number):
        return pl.ds(pl.multiple_of(number * dims.block_kv, dims.block_kv), dims.block_kv)

    views = (
        lambda number: key_pos.at[row, :, places(number)],
        lambda number: k.at[row, places(number), lanes],
        lambda number: v.at[row, places(number), lanes],
    )
    return tuple(zip(views, buffers, strict=True))


def _fill_last(x, length, fill):
    widths = [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])]
    return jnp.pad(x, widths, constant_values=fill)
