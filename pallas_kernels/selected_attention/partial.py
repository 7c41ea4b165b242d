"""`selected_attention` over some of the keys, to be merged with the others; without AD."""

import functools

from pallas_kernels import dispatch
from pallas_kernels.block_sizes import supported as limits
from pallas_kernels.selected_attention import (
    mosaic_tpu,
    triton,
    xla,
)
from pallas_kernels.selected_attention import (
    mosaic_tpu_bwd as mosaic_backward,
)
from pallas_kernels.selected_attention import (
    triton_bwd as triton_backward,
)

_FORWARD = {
    "xla": xla.forward,
    "triton": functools.partial(triton.forward, gated=()),
    "mosaic_tpu": mosaic_tpu.forward,
}
_BACKWARD = {
    "xla": xla.backward,
    "triton": triton_backward.backward,
    "mosaic_tpu": mosaic_backward.backward,
}


def forward(q, k, v, blocks, pos, *, scale, implementation, interpret):
    """What `api.py` takes, for the keys at hand.

    Returns:
      out float[b s n h] and lse float32[b s n], the logarithm of the softmax denominator; 0 and
      -inf where a query sees none of these keys.

    Raises:
      ValueError: the platform or the sizes are not those of `implementation`.
      NotImplementedError: `implementation` has no kernel.
    """
    name = _name(q, k, v, blocks, implementation, interpret)
    settings = dispatch.settings(name, interpret)
    return _FORWARD[name](q, k, v, blocks, pos, scale=scale, **settings)


def backward(residuals, dout, *, scale, implementation, interpret):
    """The gradients of these keys, and what they add to that of the queries.

    Args:
      residuals: q, k, v, blocks and pos as in `forward`; then out and lse over all keys.
      dout: float[b s n h] gradient of that `out`.
      scale: factor of the logits.
      implementation: as in `forward`.
      interpret: as in `forward`.

    Returns:
      dq, dk, dv in the shapes and dtypes of q, k, v.
    """
    name = _name(*residuals[:4], implementation, interpret)
    return _BACKWARD[name](residuals, dout, scale=scale, **dispatch.settings(name, interpret))


def _name(q, k, v, blocks, implementation, interpret):
    return dispatch.resolve(
        implementation,
        _FORWARD,
        interpret=interpret,
        misfits=limits.selected_misfits(q, k, v, blocks.block),
    )
