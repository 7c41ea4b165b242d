"""The paper's attention: native sparse attention of vision over the vision stream alone."""

import jax

from pallas_kernels import BlockSet, NSASpec, nsa_attention, nsa_blocks
from videonsa_jax.config.schema import ModelConfig, NSAConfig
from videonsa_jax.model.attention import AttentionMetadata, Streams, causal_pairs, dense_over


def attend(
    queries: Streams,
    keys: Streams,
    values: Streams,
    *,
    cached_kv: tuple[jax.Array, jax.Array],
    gates: jax.Array,
    metadata: AttentionMetadata,
    cfg: ModelConfig,
    implementation: str | None,
) -> Streams:
    """Text attends densely to everything before it, vision sparsely to the vision before it.

    The arguments are those of `videonsa_jax.model.attention.attend`; `metadata.vision_segment` says
    which sequence a token is of, and blocks start where sequences do.
    """
    dense = dense_over(cached_kv, metadata, implementation)
    text = dense(queries.text, metadata.order.text, metadata.start.text)
    if queries.vision.shape[1] == 0:
        return Streams(queries.vision, text)
    vision = nsa_attention(
        queries.vision,
        keys.vision,
        values.vision,
        gates,
        spec=sparse_spec(cfg),
        segment_ids=metadata.vision_segment,
        implementation=implementation,
    )
    return Streams(vision, text)


def selected_blocks(
    queries: jax.Array,
    keys: jax.Array,
    *,
    segments: jax.Array,
    cfg: ModelConfig,
    implementation: str | None,
) -> BlockSet:
    """What the vision queries f[b r n h] of `attend` select of the keys f[b r k h]."""
    return nsa_blocks(
        queries, keys, spec=sparse_spec(cfg), segment_ids=segments, implementation=implementation
    )


def sparse_spec(cfg: ModelConfig) -> NSASpec:
    """The sizes of sparse attention, as `pallas_kernels` takes them."""
    return NSASpec(
        block_size=cfg.nsa.block_size,
        block_count=cfg.nsa.block_count,
        window_size=cfg.nsa.window_size,
    )


def sparse_pairs(nsa: NSAConfig, tokens: int) -> float:
    """Pairs of a query with block means, selected keys and nearby keys (arXiv:2510.02295 2.2)."""
    block = nsa.block_size
    compressed = block * causal_pairs(tokens // block - 1) + tokens % block * (tokens // block)
    compressed += tokens // block  # the query that ends a block sees it
    first = min(nsa.block_count * block, tokens)  # these queries see everything before them
    own = block / 2  # keys of the query's own block, on average
    selected = causal_pairs(first) + (tokens - first) * ((nsa.block_count - 1) * block + own + 0.5)
    near = min(nsa.window_size, tokens)
    window = causal_pairs(near) + (tokens - near) * near
    return compressed + selected + window
