"""How every analysis looks, and where it is written."""

import csv
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Distinguishable for colour-blind readers too; the first three are also those of the branches.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DPI = 150


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Axes) -> None:
    """No box, and a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def write(
    out: str | pathlib.Path,
    name: str,
    *,
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    figure: Figure,
) -> None:
    """Writes NAME.csv, NAME.json and NAME.png into a folder, made if it does not exist.

    Args:
      out: the folder.
      name: of the three files.
      rows: the numbers drawn, at least one row; all rows have the same columns.
      summary: what the numbers say.
      figure: the picture.
    """
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    (out / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n")
    figure.savefig(out / f"{name}.png", dpi=DPI)
