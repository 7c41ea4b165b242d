"""What is static about one attention operation."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Chosen once, at the border of an operation, and passed on to its kernels.

    Attributes:
      name: of the operation, in tables of sizes and in the names of its kernels.
      scale: factor of the logits.
      interpret: run Pallas kernels in the interpreter; the others ignore it.
      max_distance: no query sees keys further apart than this; None: not known.
    """

    name: str
    scale: float
    interpret: bool = False
    max_distance: int | None = None
