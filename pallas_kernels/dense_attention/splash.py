"""Dense attention of many queries on TPUs, by JAX's splash attention.

Splash attention masks by index. The keys are therefore sorted by position once per call. What a
query sees is then a range of indices: up to its last key, by a causal mask whose query indices are
known when the program runs, and from the begin of its sequence on, by segment ids. Tiles of keys
that a tile of queries does not reach are skipped.

A position from which one query sees on is the begin of a sequence: no other query sees keys on both
sides of it.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.block_sizes.tpu import LANES
from pallas_kernels.compat import splash, splash_mask
from pallas_kernels.flash_attention.mask import KeyRangeMask
from pallas_kernels.flash_attention.tile_schedule import TileSchedule

BLOCK = 512  # queries and keys per tile


def attend(q, k, v, mask, config):
    """Softmax attention of each query over the keys it sees.

    Args:
      q: float[b s n h] queries, h <= 128; query head i reads KV head i // (n // k).
      k: float[b t k h] keys.
      v: float[b t k h] values.
      mask: what each query sees, of keys at `key_pos`.
      config: what is static.

    Returns:
      float[b s n h], dtype of `q`; exactly 0 where nothing is visible.
    """
    t = k.shape[1]
    order, ranks = _sort(mask)
    live = ranks.hi > ranks.lo
    schedule = TileSchedule.by_query(ranks, t, block_q=_block(q.shape[1]), block_kv=_block(t))
    # What nobody sees may be NaN, which a weight of 0 would keep.
    seen = (schedule.key_pos >= 0)[..., None, None]
    k, v = (_reorder(x, order, seen) for x in (k, v))
    q = (ranks.zero_blind(q).astype(jnp.float32) * config.scale).astype(q.dtype)
    rows = _by_head(q), _by_head(k), _by_head(v), _mask(ranks, schedule.ranges, t)
    out = jax.lax.map(lambda row: _kernel(*row, config.interpret), rows)
    out = jnp.swapaxes(out, 1, 2)[:, : q.shape[1], :, : q.shape[3]]
    return jnp.where(live[..., None, None], out, 0)


def _sort(mask):
    """The order of the keys by position i32[b t], and the mask of what is sorted, by index."""
    order = jnp.argsort(mask.key_pos, axis=1)
    positions = jnp.take_along_axis(mask.key_pos, order, axis=1)
    find = jax.vmap(functools.partial(jnp.searchsorted, method="scan_unrolled"))
    lo, hi = (find(positions, x).astype(jnp.int32) for x in (mask.lo, mask.hi))
    return order, KeyRangeMask(lo, hi)


def _reorder(x, order, seen):
    """[b t k h] in the order i32[b t], 0 where nobody sees it."""
    return jnp.where(seen, jnp.take_along_axis(x, order[..., None, None], axis=1), 0)


def _by_head(x):
    """[b s n h] -> [b n tiles*block LANES], filled with zeros."""
    s, h = x.shape[1], x.shape[3]
    fill = (0, 0), (0, -s % _block(s)), (0, 0), (0, LANES - h)
    return jnp.swapaxes(jnp.pad(x, fill), 1, 2)


def _mask(ranks, ranges, t):
    """What `_kernel` takes: per query the last key and the sequence, per key the sequence, tiles.

    Of the keys those at first_tile .. end_tile - 1 are reached by the queries of a tile.
    """
    live = ranks.hi > ranks.lo
    row = jnp.arange(live.shape[0])[:, None]
    begins = jnp.zeros((live.shape[0], t + 1), jnp.int32)
    begins = begins.at[row, jnp.where(live, ranks.lo, t)].set(1)
    keys = jnp.cumsum(begins, axis=1)[:, :t]  # the number of sequences that have begun
    queries = jnp.where(live, jnp.take_along_axis(keys, jnp.minimum(ranks.lo, t - 1), axis=1), -1)
    s = live.shape[1]
    fill = (0, 0), (0, -s % _block(s))
    last, queries = (jnp.pad(x, fill, constant_values=-1) for x in (ranks.hi - 1, queries))
    keys = jnp.pad(keys, ((0, 0), (0, -t % _block(t))), constant_values=-2)
    return last, queries, keys, ranges[..., 0], ranges[..., 3]


def _kernel(q, k, v, mask, interpret):
    """One row of the batch: q [n s LANES], k and v [k t LANES] -> [n s LANES]."""
    last, query_ids, key_ids, first_tile, end_tile = mask
    rows, keys = _block(q.shape[1]), _block(k.shape[1])
    tile = jnp.arange(k.shape[1] // keys, dtype=jnp.int32)
    begin, end = first_tile[:, None], end_tile[:, None]
    reach = (begin <= tile) & (tile < end)
    # The tile in memory while another is skipped: one that is needed soon or was just used.
    near = jnp.clip(tile, begin, jnp.maximum(end - 1, begin))
    own = jnp.broadcast_to(jnp.arange(reach.shape[0], dtype=jnp.int32)[:, None], reach.shape)

    def info(at):
        return splash_mask.MaskInfo(
            data_next=at[None],
            mask_next=None,
            block_mask=reach[None].astype(jnp.int32),
            partial_mask_blocks=None,
            q_sequence=last,
        )

    run = splash.SplashAttentionKernel(
        info(near),
        info(near),
        info(own),
        block_sizes=splash.BlockSizes(rows, keys, keys, rows, keys, keys, rows, keys),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_upto,
        interpret=interpret,
    )
    return run(q, k, v, splash.SegmentIds(query_ids, key_ids))


def _upto(last, key):
    return last >= key


def _block(length):
    """Queries or keys per tile: all of a short sequence, in whole registers."""
    return min(BLOCK, -(-length // LANES) * LANES)
