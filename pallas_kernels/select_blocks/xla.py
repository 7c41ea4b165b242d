"""Stand-in until the tiled implementation."""

from pallas_kernels.select_blocks.ref import select_blocks  # noqa: F401
