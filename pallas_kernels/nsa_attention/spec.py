"""The shape of native sparse attention: sizes only, no arrays."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class NSASpec:
    """Sizes of the three branches.

    Attributes:
      block_size: keys per block, of the compressed and of the selected branch.
      block_count: blocks that a query selects in all, forced ones included.
      window_size: keys that a query sees in the window branch, its own included.
      forced_first: leading blocks of the query's sequence that are always selected.
      forced_local: trailing blocks that are always selected; 1 is the query's own block.

    Raises:
      ValueError: a size is out of range, or more blocks are forced than selected.
    """

    block_size: int = 64
    block_count: int = 32
    window_size: int = 256
    forced_first: int = 0
    forced_local: int = 1

    def __post_init__(self):
        least = {field.name: 1 for field in dataclasses.fields(self)} | {"forced_first": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                raise ValueError(f"NSASpec.{name} must be an integer >= {lowest}, got {value!r}")
        if self.forced_first + self.forced_local > self.block_count:
            raise ValueError(
                f"NSASpec forces {self.forced_first} first + {self.forced_local} local blocks, "
                f"more than block_count={self.block_count}"
            )
