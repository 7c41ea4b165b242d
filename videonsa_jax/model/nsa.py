"""The paper's attention for vision tokens: native sparse attention over the vision stream alone."""

import jax

from pallas_kernels import BlockSet, NSASpec, nsa_attention, nsa_blocks
from videonsa_jax.config.schema import ModelConfig


def vision_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    gates: jax.Array,
    *,
    segments: jax.Array,
    cfg: ModelConfig,
    implementation: str | None,
) -> jax.Array:
    """Three gated branches over the vision keys of the same sequence.

    Args:
      queries: f[b r n h], rotated.
      keys: f[b r k h], rotated.
      values: f[b r k h].
      gates: f32[b r n 3].
      segments: i32[b r] sequence of each token, -1 at padding; blocks start where sequences start.
      cfg: block size, block count and window.
      implementation: see `pallas_kernels`.

    Returns:
      f[b r n h]; 0 at padding.
    """
    return nsa_attention(
        queries,
        keys,
        values,
        gates,
        spec=sparse_spec(cfg),
        segment_ids=segments,
        implementation=implementation,
    )


def selected_blocks(
    queries: jax.Array,
    keys: jax.Array,
    *,
    segments: jax.Array,
    cfg: ModelConfig,
    implementation: str | None,
) -> BlockSet:
    """What `vision_attention` selects, for the same arguments."""
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
