"""Stand-in until the tiled implementation."""

from pallas_kernels.window_attention.ref import window_attention  # noqa: F401
