"""Mean of each block of tokens: the compression step of native sparse attention."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.block_mean import ref


def block_mean(
    x: jax.Array,
    *,
    block: int,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Averages every `block` consecutive tokens; accumulates in float32.

    Args:
      x: float[b t k h] keys or values, t a multiple of `block`.
      block: tokens per block.
      implementation: None, "reference" or "xla", which are the same: XLA fuses the one formula on
        every platform.
      interpret: ignored; there is no Pallas kernel.

    Returns:
      float[b c k h], c = t // block, dtype of `x`.

    Raises:
      ValueError: `x` is not rank 4, or t is not a multiple of `block`, or `implementation` is
        unknown.
      NotImplementedError: `implementation` has no kernel.
    """
    t = dispatch.bind_dims(x=(x, "b t k h"))["t"]
    if t % block:
        raise ValueError(f"x has {t} tokens, not a multiple of block={block}")
    if implementation is not None:
        dispatch.check_name(implementation, (dispatch.REFERENCE, "xla"))
    return ref.block_mean(x, block=block)
