"""Whether a compiled program holds an array with a number for every token and block of keys."""

import math
import re
from collections.abc import Collection

from videonsa_jax.aot.hlo import Program


def scores(hlo: str, tokens: int, block_size: int, heads: Collection[int]) -> set[str]:
    """The arrays in a program's memory that are `tokens` queries by all blocks of keys, or larger.

    One dimension of them is the blocks, also filled up to a power of two, and also times the heads;
    the others are a multiple of `tokens`. So `tokens` should be a length that needs no filling up
    itself, and whose count of blocks is no other size of the program.

    Args:
      hlo: text of an optimized program.
      tokens: queries.
      block_size: tokens per block of keys.
      heads: numbers of heads.
    """
    blocks = -(-tokens // block_size)
    counts = {blocks, 1 << (blocks - 1).bit_length()}
    columns = counts | {count * head for count in counts for head in heads}
    found = set()
    for array in Program(hlo).in_memory():
        sizes = [int(size) for size in re.search(r"\[([\d,]*)\]", array)[1].split(",") if size]
        whole = math.prod(sizes)
        if whole and any(size in columns and whole // size % tokens == 0 for size in sizes):
            found.add(array)
    return found
