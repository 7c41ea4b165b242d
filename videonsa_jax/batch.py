"""The arrays that flow through the model: one field per role, one shape per field.

Letters: b row, s tokens of one stream, t keys, p patches, e values per patch, l layers, k KV heads,
h head width.
"""

import dataclasses

import jax
import numpy as np

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows in modality-major order: a vision stream and a text stream. Axis 0 of each array is b.

    A row may pack several sequences. `order` is a token's index in the row as it was written
    (sequences one after the other, vision and text interleaved); a token sees the keys with
    `start <= key order <= its order`. Padding has order -1 and an unreachable start: it sees
    nothing and nothing sees it.

    The vision stream holds merged vision tokens in sequence order; each sequence's first one sits
    at a multiple of the NSA block. Patches are stored in window order (frame by frame, window by
    window), merge_size**2 of them per merged token: for merge size 2, patches 4j .. 4j+3 are merged
    into token j of that order.
    """

    text_tokens: Array  # i32[b s] token ids, 0 at padding
    text_targets: Array  # i32[b s] the id that follows, 0 where `text_weights` is 0
    text_weights: Array  # f32[b s] weight of the loss at this token's prediction
    text_positions: Array  # i32[b s 3] rotary ids (time, height, width)
    text_order: Array  # i32[b s]; -1 at padding
    text_start: Array  # i32[b s] order of its sequence's first token; 2**30 at padding
    vision_positions: Array  # i32[b s 3]
    vision_order: Array  # i32[b s]; -1 at padding
    vision_start: Array  # i32[b s]; 2**30 at padding
    vision_segment: Array  # i32[b s] which sequence of the row, from 0; -1 at padding
    vision_slot: Array  # i32[b s] where this merged token stands in window order
    patches: Array  # f[b p e], p = merge_size**2 x vision slots, in window order
    patch_positions: Array  # i32[b p 2] (row, column) in its frame
    patch_window: Array  # i32[b p 2] its window is the half-open range of patches; empty at padding
    patch_frame: Array  # i32[b p 2] likewise its frame
    frame_patches: int  # static: no frame has more patches than this


jax.tree_util.register_dataclass(
    Batch,
    data_fields=[f.name for f in dataclasses.fields(Batch) if f.name != "frame_patches"],
    meta_fields=["frame_patches"],
)


@dataclasses.dataclass(frozen=True)
class Cache:
    """Rotated keys and values of all layers, with each slot's place in its row."""

    keys: Array  # f[l b t k h]
    values: Array  # f[l b t k h]
    key_order: Array  # i32[b t]; -1 where nothing is stored, which no query sees
    next_slot: Array  # i32[] where the next token's key goes (the same for every row)
    next_order: Array  # i32[b] order of the next token
    next_position: Array  # i32[b] rotary id of the next token (all three equal: it is text)


jax.tree_util.register_dataclass(
    Cache, data_fields=[f.name for f in dataclasses.fields(Cache)], meta_fields=[]
)
