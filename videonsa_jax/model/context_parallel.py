"""Attention where every device holds a part of both streams."""

import dataclasses
import functools
from typing import Literal

import jax

from pallas_kernels import (
    DenseReader,
    MeshAxis,
    SelectedReader,
    ShardBranches,
    combine,
    nsa_shard_branches,
    sharded_attention,
)
from videonsa_jax.config.schema import ModelConfig
from videonsa_jax.model.attention import AttentionMetadata, Streams, dense_over
from videonsa_jax.model.nsa import sparse_spec


@dataclasses.dataclass(frozen=True)
class Shards:
    """The devices that split the streams, how keys reach them, and how attention is computed."""

    axis: MeshAxis
    mode: Literal["gather", "ring"]  # see `ComputeConfig.cp_mode`
    implementation: str | None  # see `pallas_kernels`


def attend(
    queries: Streams,
    keys: Streams,
    values: Streams,
    *,
    cached_kv: tuple[jax.Array, jax.Array] | None,
    gates: jax.Array | None,
    metadata: AttentionMetadata,
    cfg: ModelConfig,
    shards: Shards,
) -> Streams:
    """As `attention.attend`, of a device's part of the tokens; inside of `jax.shard_map`.

    Args:
      queries: f[b . n h].
      keys: f[b . k h] of the same tokens.
      values: f[b . k h].
      cached_kv: whole on every device, as is the text stream then; None: all devices' keys at hand.
      gates: f32[b r n 3] of the paper's attention of vision; None: dense.
      metadata: order and start of these tokens; segment and key order of all devices'.
      cfg: as in `attention.attend`.
      shards: what the devices share.

    Returns:
      f[b . n h].
    """
    implementation = shards.implementation
    over_all = functools.partial(
        sharded_attention,
        axis=shards.axis,
        scale=queries.text.shape[-1] ** -0.5,
        mode=shards.mode,
        implementation=implementation,
    )
    sparse = None
    if gates is not None:
        sparse = nsa_shard_branches(
            *(x.vision for x in (queries, keys, values)),
            spec=sparse_spec(cfg),
            axis=shards.axis,
            segment_ids=metadata.vision_segment,
            implementation=implementation,
        )
    if cached_kv is None:
        streams = tuple(zip(keys, values, strict=True))
        vision, text = over_all(tuple(queries), streams, _readers(sparse, metadata))
    else:
        dense = dense_over(cached_kv, metadata, implementation)
        text = dense(queries.text, metadata.order.text, metadata.start.text)
        if sparse is None:
            vision = dense(queries.vision, metadata.order.vision, metadata.start.vision)
        else:
            stream, reader = (keys.vision, values.vision), _selected(sparse)
            (vision,) = over_all((queries.vision,), (stream,), (reader,))
    if sparse is not None:
        vision = combine(gates, (sparse.compressed, vision, sparse.window), sparse.pos)
    return Streams(vision, text)


def _selected(sparse: ShardBranches) -> SelectedReader:
    return SelectedReader(sparse.blocks, sparse.pos)


def _readers(sparse: ShardBranches | None, metadata: AttentionMetadata) -> tuple:
    """What vision queries and what text queries see of all devices' keys."""
    slots = metadata.vision_segment.shape[1]
    key_pos = metadata.key_order[:, :slots], metadata.key_order[:, slots:]
    vision, text = (
        DenseReader(start, order, key_pos)
        for start, order in zip(metadata.start, metadata.order, strict=True)
    )
    return (vision if sparse is None else _selected(sparse)), text
