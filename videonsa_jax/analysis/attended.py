"""Which share of dense attention's work the vision queries do: pairs used / causal pairs.

A branch's pairs are counted as if it were alone, so a key that is both in the window and in a
selected block counts twice: the fraction is an upper bound of the distinct keys seen. For very
short videos it exceeds 1.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from videonsa_jax.analysis import inputs, report
from videonsa_jax.config.schema import NSAConfig


@dataclasses.dataclass(frozen=True)
class PairCounts:
    """(query, key) pairs of the vision queries of one sequence, for one query head."""

    causal: int  # what dense causal attention among the same tokens uses
    compressed: int  # pooled keys, one per completed block
    selected: int
    window: int

    @property
    def fraction(self) -> float:
        """All three branches over dense; 0 without vision tokens."""
        used = self.compressed + self.selected + self.window
        return used / self.causal if self.causal else 0.0


def pair_counts(vision_tokens: int, nsa: NSAConfig) -> PairCounts:
    """Counts the pairs of a sequence's vision tokens, in closed form per query.

    Token t of block j = t // block_size sees: the pooled key of each block that ends at or before
    it; its own block up to itself and, whole, min(block_count - 1, j) earlier ones; the last
    window_size keys, itself included.
    """
    t = np.arange(vision_tokens, dtype=np.int64)
    block, inside = t // nsa.block_size, t % nsa.block_size
    earlier = np.minimum(nsa.block_count - 1, block)
    return PairCounts(
        causal=int((t + 1).sum()),
        compressed=int(((t + 1) // nsa.block_size).sum()),
        selected=int((inside + 1 + earlier * nsa.block_size).sum()),
        window=int(np.minimum(t + 1, nsa.window_size).sum()),
    )


def attended_fraction(vision_tokens: int, nsa: NSAConfig) -> float:
    """Query-key pairs that vision queries use, pooled keys counted, over causal pairs."""
    return pair_counts(vision_tokens, nsa).fraction


def selected_pairs(members: np.ndarray, block_size: int) -> float:
    """The `selected` of `PairCounts`, counted from a layer's choice; the mean over KV heads.

    Args:
      members: bool[r k c], the blocks of each vision query of one sequence.
      block_size: keys per block.
    """
    t = np.arange(len(members))
    keys = np.minimum(block_size, t[:, None] + 1 - block_size * np.arange(members.shape[-1]))
    return float((members * keys[:, None].clip(0)).sum() / members.shape[1])


def curve(lengths: Sequence[int], nsa: NSAConfig, out: str | pathlib.Path) -> dict[str, Any]:
    """Writes attended.csv, attended.png and attended.json.

    Args:
      lengths: numbers of vision tokens, at least one.
      nsa: sizes of the branches.
      out: folder.

    Returns:
      nsa: its sizes; fraction: number of tokens -> value.
    """
    rows = []
    for tokens in lengths:
        counts = pair_counts(tokens, nsa)
        shares = {
            name: getattr(counts, name) / counts.causal
            for name in ("compressed", "selected", "window")
        }
        rows.append({"vision_tokens": tokens, **shares, "all": counts.fraction})
    summary = {
        "nsa": dataclasses.asdict(nsa),
        "fraction": {str(row["vision_tokens"]): row["all"] for row in rows},
    }
    report.write(out, "attended", rows=rows, summary=summary, figure=_figure(rows, nsa))
    return summary


def _figure(rows: Sequence[dict[str, Any]], nsa: NSAConfig):
    figure = report.new_figure(7, 4)
    axes = figure.subplots()
    tokens = [row["vision_tokens"] for row in rows]
    for name, colour in zip(("compressed", "selected", "window"), report.COLOURS, strict=False):
        axes.plot(tokens, [row[name] for row in rows], color=colour, label=name)
    axes.plot(tokens, [row["all"] for row in rows], color="black", linewidth=2, label="all three")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.3g}")
    axes.set(
        xlabel="vision tokens",
        ylabel="query-key pairs / causal pairs",
        title=f"{nsa.block_count} blocks of {nsa.block_size}, window {nsa.window_size}",
    )
    axes.legend(frameon=False)
    report.tidy(axes)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this verb."""
    inputs.add_config(parser)
    lengths = [2**i for i in range(10, 18)]
    parser.add_argument("--tokens", type=int, nargs="+", default=lengths, help="vision tokens")


def main(args: argparse.Namespace) -> None:
    """Runs the verb."""
    curve(args.tokens, inputs.config_of(args).model.nsa, args.out)
