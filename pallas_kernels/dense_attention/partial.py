"""`dense_attention` over some of the keys, to be merged with the others; without AD."""

from pallas_kernels import dispatch
from pallas_kernels.block_sizes import supported as limits
from pallas_kernels.dense_attention import mosaic_tpu, triton, xla

_IMPLEMENTATIONS = {"xla": xla, "triton": triton, "mosaic_tpu": mosaic_tpu}


def forward(q, k, v, places, *, scale, implementation, interpret):
    """What `api.py` takes, for the keys at hand; `places` are start, query_pos and key_pos.

    Returns:
      out float[b s n h] and lse float32[b s n], the logarithm of the softmax denominator; 0 and
      -inf where a query sees none of these keys.

    Raises:
      ValueError: the platform or the sizes are not those of `implementation`.
      NotImplementedError: `implementation` has no kernel.
    """
    name = _name(q, k, v, implementation, interpret)
    run = _IMPLEMENTATIONS[name].forward
    settings = dispatch.settings(name, interpret)
    return run(q, k, v, *places, scale=scale, **settings)


def backward(residuals, dout, *, scale, implementation, interpret):
    """The gradients of these keys, and what they add to that of the queries.

    Args:
      residuals: q, k, v, start, query_pos and key_pos as in `forward`; then out and lse over all
        keys.
      dout: float[b s n h] gradient of that `out`.
      scale: factor of the logits.
      implementation: as in `forward`.
      interpret: as in `forward`.

    Returns:
      dq, dk, dv in the shapes and dtypes of q, k, v.
    """
    name = _name(*residuals[:3], implementation, interpret)
    run = _IMPLEMENTATIONS[name].backward
    return run(residuals, dout, scale=scale, **dispatch.settings(name, interpret))


def _name(q, k, v, implementation, interpret):
    return dispatch.resolve(
        implementation,
        _IMPLEMENTATIONS,
        interpret=interpret,
        misfits=limits.attention_misfits(q, k, v),
    )
