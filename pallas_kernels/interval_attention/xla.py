"""Stand-in until the tiled implementation."""

from pallas_kernels.interval_attention.ref import interval_attention  # noqa: F401
