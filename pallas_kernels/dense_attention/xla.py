"""Stand-in until the tiled implementation."""

from pallas_kernels.dense_attention.ref import dense_attention  # noqa: F401
