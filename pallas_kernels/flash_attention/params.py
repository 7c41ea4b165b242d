"""Which operation a kernel of attention over ranges works for."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Job:
    """What is static about one operation.

    Attributes:
      name: of the operation, in tables of sizes and in the names of its kernels.
      scale: factor of the logits.
      interpret: run in the interpreter.
      reach: no query sees keys further apart than this; None: not known.
    """

    name: str
    scale: float
    interpret: bool
    reach: int | None = None
