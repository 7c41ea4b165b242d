"""What the forward and the backward kernels of attention under a `Sight` have in common on TPUs.

Inside of the kernels logits lie with keys on sublanes and queries on lanes, [keys rows]: what is
known per query, such as the maximum of a softmax, is then a row of lanes, and reductions over keys
need no exchange between lanes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes import tpu as tpu_sizes
from pallas_kernels.block_sizes.tpu import LANES
from pallas_kernels.compat import pl, pltpu

BUFFERS = 3  # tiles in memory: the one at work and those on their way


@dataclasses.dataclass(frozen=True)
class Cut:
    """How one call is cut.

    Attributes:
      b: rows of the batch.
      heads: KV heads.
      group: query heads per KV head; in the kernels each has LANES values.
      s: queries.
      t: keys.
      rows: queries of a tile.
      keys: keys of a tile.
      vmem: bytes that a kernel may take.
    """

    b: int
    heads: int
    group: int
    s: int
    t: int
    rows: int
    keys: int
    vmem: int

    @classmethod
    def of(cls, q, k):
        """For q [b s n h] and k [b t k h] on this device."""
        b, s, n, _ = q.shape
        t, heads = k.shape[1:3]
        sizes = tpu_sizes.pick(compat.device_kind())
        rows, keys = min(sizes.rows, filled(s, LANES)), min(sizes.keys, filled(t, LANES))
        return cls(b, heads, n // heads, s, t, rows, keys, sizes.vmem)

    @property
    def tiles(self):
        """Tiles of queries."""
        return -(-self.s // self.rows)

    @property
    def key_tiles(self):
        """Tiles of keys."""
        return -(-self.t // self.keys)

    def queries(self, x):
        """[b s n h] -> [b tiles*rows n*LANES], zeros where nothing was."""
        return flat(x, self.tiles * self.rows)

    def all_keys(self, x):
        """[b t k h] -> [b key_tiles*keys k*LANES]."""
        return flat(x, self.key_tiles * self.keys)

    def unflat(self, x, like):
        """The inverse of `queries` or `all_keys`, in the shape and dtype of `like`."""
        b, length, n, h = like.shape
        return x.reshape(b, -1, n, LANES)[:, :length, :, :h].astype(like.dtype)

    def limits(self, lo, hi):
        """i32[b s], i32[b s] -> i32[b 2 tiles*rows]; the queries that are added see nothing."""
        both = jnp.stack([jnp.maximum(lo, 0), hi], axis=1)
        return _fill_last(both, self.tiles * self.rows, 0)

    def stats(self, x, fill):
        """f32[b s n] -> f32[b k g tiles*rows]."""
        x = jnp.moveaxis(x, 1, 2).reshape(self.b, self.heads, self.group, self.s)
        return _fill_last(x, self.tiles * self.rows, fill)

    def unstats(self, x):
        """The inverse of `stats`."""
        x = x[..., : self.s].reshape(self.b, self.heads * self.group, self.s)
        return jnp.moveaxis(x, 1, 2)

    def positions(self, key_pos):
        """i32[b t] -> i32[b 1 key_tiles*keys]; the keys that are added are never seen."""
        return _fill_last(key_pos, self.key_tiles * self.keys, -1)[:, None]


def filled(size, multiple):
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def schedule(visits):
    """The arrays of a `Visits` and the spec of each: a step reads its own numbers as scalars."""
    arrays = [visits.spans] if visits.ids is None else [visits.spans, visits.ids]
    specs = [
        pl.BlockSpec(
            (None, None, 1, x.shape[2]),
            lambda row, _, tile: (row, tile, 0, 0),
            memory_space=pltpu.SMEM,
        )
        for x in arrays
    ]
    return [x[:, :, None] for x in arrays], specs


def walk(plan, streams, semaphores, steps):
    """Visits the tiles of a step's schedule, first the whole ones, and copies the next meanwhile.

    Args:
      plan: refs of the spans [1 4] and, where tiles are listed, of the ids [1 c].
      streams: pairs of a function that views a tile in HBM by its number, and a ref
        [BUFFERS ...] to copy it to.
      semaphores: DMA semaphores [len(streams) BUFFERS].
      steps: two functions of a buffer's index: one for whole tiles, one for the others.
    """
    spans, *ids = plan
    first, whole_first, whole_last, last = (spans[0, i] for i in range(4))
    wholes, count = whole_last - whole_first, last - first

    def number(i):
        place = first + i - wholes
        place += jnp.where(place >= whole_first, wholes, 0)
        place = jnp.where(i < wholes, whole_first + i, place)
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

    for low, high, step in ((0, wholes, steps[0]), (wholes, count, steps[1])):
        jax.lax.fori_loop(low, high, lambda i, _, step=step: visit(i, step), None)


def key_streams(cut, arrays, buffers):
    """`walk`'s streams of key tiles of this step's KV head: positions, keys and values."""
    row, lanes = pl.program_id(0), pl.ds(pl.multiple_of(pl.program_id(1) * LANES, LANES), LANES)
    key_pos, k, v = arrays

    def places(number):
        return pl.ds(pl.multiple_of(number * cut.keys, cut.keys), cut.keys)

    views = (
        lambda number: key_pos.at[row, :, places(number)],
        lambda number: k.at[row, places(number), lanes],
        lambda number: v.at[row, places(number), lanes],
    )
    return tuple(zip(views, buffers, strict=True))


def product(x, y, x_axis, y_axis):
    """Matrix product over one axis of each, accumulated in float32; float32 factors count whole."""
    exact = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def column(row, lanes):
    """A row [1 m] -> [m lanes]: the same along every row."""
    return jnp.broadcast_to(row, (lanes, row.shape[1])).T


def kept(x, keep):
    """Zeros where bool `keep`, which was compared in 32 bits, is False."""
    return jnp.where(keep, x.astype(jnp.float32), 0.0).astype(x.dtype)


def head_lanes(i):
    """The lanes of head i of a group."""
    return slice(i * LANES, (i + 1) * LANES)


def flat(x, length):
    """[b s n h] -> [b length n*LANES], zeros where nothing was."""
    b, _, n, h = x.shape
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, LANES - h)))
    return x.reshape(b, length, n * LANES)


def _fill_last(x, length, fill):
    widths = [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])]
    return jnp.pad(x, widths, constant_values=fill)
