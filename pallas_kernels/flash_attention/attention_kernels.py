"""A forward and a backward kernel as one differentiable function."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.flash_attention.params import KernelConfig


@dataclasses.dataclass(frozen=True)
class AttentionKernels:
    """Softmax attention of each query over the keys it sees, by one backend.

    What a query sees is `sees`, a pytree: a `KeyRangeMask` or `ChosenKeys`.

    Attributes:
      forward: (q, k, v, sees, config) -> out float[b s n h], dtype of q, and lse float32[b s n],
        the logarithm of the softmax denominator; 0 and -inf for a query that sees nothing.
      backward: ((q, k, v, sees, out, lse), dout, config) -> dq, dk, dv in the shapes and dtypes of
        q, k, v. `out` and `lse` may be those over more keys than k: then these are the gradients of
        k and v, and what they add to that of q.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, sees: Any, config: KernelConfig
    ) -> tuple[jax.Array, jax.Array]:
        """out and lse of `forward`, differentiated by `backward`; no gradient flows through lse.

        Args:
          q: float[b s n h] queries; query head i reads KV head i // (n // k).
          k: float[b t k h] keys.
          v: float[b t k h] values.
          sees: what each query sees.
          config: what is static.
        """
        return _attend(q, k, v, sees, self, config)


@functools.partial(jax.custom_vjp, nondiff_argnames=("kernels", "config"))
def _attend(q, k, v, sees, kernels, config):
    return kernels.forward(q, k, v, sees, config)


def _attend_fwd(q, k, v, sees, kernels, config):
    out, lse = kernels.forward(q, k, v, sees, config)
    return (out, lse), (q, k, v, sees, out, lse)


def _attend_bwd(kernels, config, residuals, cotangents):
    return *kernels.backward(residuals, cotangents[0], config), None


_attend.defvjp(_attend_fwd, _attend_bwd)
