"""Which share of dense attention's work the vision queries do: pairs used / causal pairs.

A branch's pairs are counted as if it were alone, so a key that is both in the window and in a
selected block counts twice: the fraction is an upper bound of the distinct keys seen. For very
short videos it exceeds 1.
"""

import dataclasses

import numpy as np

from videonsa_jax.config import NSAConfig


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
