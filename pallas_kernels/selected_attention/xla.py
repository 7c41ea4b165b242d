"""Stand-in until the tiled implementation."""

from pallas_kernels.selected_attention.ref import selected_attention  # noqa: F401
