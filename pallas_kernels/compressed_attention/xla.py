"""Stand-in until the tiled implementation."""

from pallas_kernels.compressed_attention.ref import compressed_attention  # noqa: F401
