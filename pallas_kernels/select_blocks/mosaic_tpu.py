"""`select_blocks` on TPUs: scores, search and packing in one kernel; no score leaves VMEM.

A program takes a tile of queries and one KV head. Blocks lie on sublanes and queries on lanes, so
every count of the search for the lowest chosen score adds whole registers. Only the blocks between
the first and the last candidate of the tile's queries are scored and searched.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.block_sizes import tpu as block_sizes
from pallas_kernels.block_sizes.tpu import LANES
from pallas_kernels.block_sparse.block_set import WORD, BlockSet
from pallas_kernels.compat import pl, pltpu
from pallas_kernels.tpu_layout import flat, head_lanes, product

CHUNK = 8 * WORD  # blocks per step: their words fill a register
SUBLANES = 8  # of a register
FORCED = 0x7F800000  # infinity: ranks before every score


def select_blocks(q, k, lse, visible, own, rule, config):
    """See `Backend.select`."""
    b, s, n, _ = q.shape
    c, heads = k.shape[1:3]
    group, tiles, blocks = n // heads, -(-s // LANES), -(-c // CHUNK) * CHUNK

    def rows(x, fill):
        """[b s i] -> [b i s'], s' whole tiles."""
        widths = (0, 0), (0, -s % LANES), (0, 0)
        return jnp.pad(x, widths, constant_values=fill).swapaxes(1, 2)

    places = rows(jnp.concatenate([visible, own[..., None]], axis=2), -1)
    norms = rows(lse, 0).reshape(b, heads, group, -1)
    run = compat.mosaic_call(
        functools.partial(_choose, group=group, rule=rule, scale=config.scale),
        grid=(b, heads, tiles),
        in_specs=[
            pl.BlockSpec(
                (None, None, 1, 2), lambda b, _, tile: (b, tile, 0, 0), memory_space=pltpu.SMEM
            ),
            pl.BlockSpec((None, 3, LANES), lambda b, _, tile: (b, 0, tile)),
            pl.BlockSpec((None, None, group, LANES), lambda b, k, tile: (b, k, 0, tile)),
            pl.BlockSpec((None, LANES, group * LANES), lambda b, k, tile: (b, tile, k)),
            pl.BlockSpec((None, blocks, LANES), lambda b, k, tile: (b, 0, k)),
        ],
        out_specs=pl.BlockSpec(
            (None, None, blocks // WORD, LANES), lambda b, k, tile: (b, k, 0, tile)
        ),
        out_shape=jax.ShapeDtypeStruct((b, heads, blocks // WORD, tiles * LANES), jnp.int32),
        scratch_shapes=[pltpu.VMEM((blocks, LANES), jnp.int32)],
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=block_sizes.pick(compat.device_kind()).vmem,
        interpret=config.interpret,
        name="select_blocks",
    )
    bits = run(_reach(places), places, norms, flat(q, tiles * LANES), flat(k, blocks))
    bits = jax.lax.bitcast_convert_type(bits, jnp.uint32).transpose(0, 3, 1, 2)
    return BlockSet(bits[:, :s, :, : -(-c // WORD)], rule.block, most=rule.top_k)


def _reach(places):
    """i32[b tiles 1 2]: the first chunk that holds a candidate of a tile, and the end of them."""
    b = places.shape[0]
    first, _, own = places.reshape(b, 3, -1, LANES).swapaxes(0, 1)
    live = (own >= 0) & (first <= own)
    begin = jnp.where(live, first, jnp.iinfo(jnp.int32).max).min(-1) // CHUNK
    end = (jnp.where(live, own, -1).max(-1) + CHUNK) // CHUNK
    return jnp.stack([jnp.minimum(begin, end), end], axis=-1)[..., None, :]


def _choose(*refs, group, rule, scale):
    """One tile of queries and one KV head."""
    reach, places, norms, q, means, bits, ranks = refs
    first, after, own = (places[i : i + 1, :] for i in range(3))
    queries = [q[:, head_lanes(g)] for g in range(group)]
    bases = [norms[g : g + 1, :] for g in range(group)]
    bases = [jnp.where(base == -jnp.inf, 0.0, base) for base in bases]
    fold = functools.partial(_fold, reach[0, 0], reach[0, 1])

    def rank(_, here, block):
        keys, score = means[here, :], jnp.zeros(block.shape)
        for rows, base in zip(queries, bases, strict=True):
            score += jnp.exp(product(keys, rows, 1, 1) * scale - base)
        score = jnp.where((first <= block) & (block < after), score, 0.0)
        # As integers, floats that are not negative keep their order.
        value = jax.lax.bitcast_convert_type(score, jnp.int32)
        forced = (block < first + rule.num_init_blocks) | (block > own - rule.num_local_blocks)
        value = jnp.where(forced, FORCED, value)
        ranks[here, :] = jnp.where((first <= block) & (block <= own), value, -1)

    fold(rank, None)
    least, end = _threshold(fold, ranks, rule.top_k)
    bits[...] = jnp.zeros(bits.shape, jnp.int32)

    def pack(_, here, block):
        value = ranks[here, :]
        chosen = (value > least) | ((value == least) & (block < end))
        words = (chosen.astype(jnp.int32) << (block % WORD)).reshape(-1, WORD, LANES).sum(1)
        place = pl.multiple_of(here.start // WORD, CHUNK // WORD)
        bits[pl.ds(place, CHUNK // WORD), :] = words

    fold(pack, None)


def _fold(begin, end, step, state):
    """Folds step(state, rows of a chunk, i32[CHUNK LANES] numbers of their blocks) over chunks."""

    def body(i, state):
        place = pl.multiple_of(i * CHUNK, CHUNK)
        block = place + jax.lax.broadcasted_iota(jnp.int32, (CHUNK, LANES), 0)
        return step(state, pl.ds(place, CHUNK), block)

    return jax.lax.fori_loop(begin, end, body, state)


def _threshold(fold, ranks, count):
    """The least of the `count` highest ranks, and the end of those of its blocks that are chosen.

    Both are i32[1 LANES]. Chosen are the ranks above the least one, and those equal to it of blocks
    before the end. Sets the bits of the least rank from the highest to the lowest, as long as
    `count` ranks reach it, until exactly `count` do for every query; then, where there are ties,
    those of the end.
    """

    def total(test):
        def add(totals, here, block):
            hits = test(ranks[here, :], block).astype(jnp.int32)
            return totals + hits.reshape(-1, SUBLANES, LANES).sum(0)

        return fold(add, jnp.zeros((SUBLANES, LANES), jnp.int32)).sum(0, keepdims=True)

    def unsettled(state):
        bit, _, found = state
        return (bit >= 0) & (found.max() > count)

    def try_bit(state):
        bit, least, found = state
        trial = least | (1 << bit)
        reach = total(lambda value, _: value >= trial)
        enough = reach >= count
        return bit - 1, jnp.where(enough, trial, least), jnp.where(enough, reach, found)

    zeros = jnp.zeros((1, LANES), jnp.int32)
    found = total(lambda value, _: value >= zeros)
    _, least, found = jax.lax.while_loop(unsettled, try_bit, (jnp.int32(30), zeros, found))

    blocks = ranks.shape[0]
    room = count - total(lambda value, _: value > least)

    def try_end(i, end):
        trial = end | (1 << (blocks.bit_length() - 1 - i))
        level = total(lambda value, block: (value == least) & (block < trial))
        return jnp.where(level <= room, trial, end)

    rounds = jnp.where(found.max() > count, blocks.bit_length(), 0)
    end = jax.lax.fori_loop(0, rounds, try_end, zeros)
    return least, jnp.where(found > count, end, blocks)
