"""Draws a report of strategies: memory by kind, and the parts of a step."""

import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

KINDS = (
    "parameters",
    "optimizer",
    "gradients",
    "batch",
    "activations",
    "temporaries",
    "outputs",
)
PARTS = {"compute_s": "arithmetic", "memory_s": "memory", "links_s": "links"}


def draw(title: str, rows: Sequence, file: pathlib.Path) -> None:
    """Bars per strategy, best first; `rows` are those of `report`."""
    names = [row.strategy for row in rows]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, 2 + 0.5 * len(rows)), sharey=True, layout="constrained"
    )
    offset = [0.0] * len(rows)
    for kind in KINDS:
        sizes = [row.bytes_per_device[kind] / 2**30 for row in rows]
        left.barh(names, sizes, left=offset, label=kind)
        offset = [a + b for a, b in zip(offset, sizes, strict=True)]
    left.axvline(rows[0].device_bytes / 2**30, color="black", linestyle="--", label="device")
    left.set_xlabel("GiB of one device")
    left.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    for i, (part, label) in enumerate(PARTS.items()):
        places = [at + 0.25 * (i - 1) for at in range(len(rows))]
        values = [getattr(row.times, part) if row.times else 0 for row in rows]
        right.barh(places, values, height=0.22, label=label)
    right.set_xlabel("seconds of a step at peak rates, each alone")
    right.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    figure.suptitle(title)
    left.invert_yaxis()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
