"""Native sparse attention on NVIDIA GPUs: the three branches differentiated as one operation.

Alone, each branch would get its gate times the upstream gradient as an array of its own. Here one
pass makes the gradients of the gates, which are also what the softmax gradients need, and all
branches run on the upstream gradient itself (see `triton_gate_grads.py`).
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import triton as flash
from pallas_kernels.flash_attention import triton_bwd as flash_bwd
from pallas_kernels.nsa_attention import triton_gate_grads
from pallas_kernels.nsa_attention.gating import combine
from pallas_kernels.selected_attention import triton as selected_attention
from pallas_kernels.selected_attention import triton_bwd as selected_bwd


@functools.partial(jax.custom_vjp, nondiff_argnames=("configs",))
def gated_attention(q, k, v, means, gates, compressed, masks, configs):
    """The gated sum of the compressed, the selected and the window branch.

    Args:
      q: float[b s n h] queries.
      k: float[b t k h] keys.
      v: float[b t k h] values.
      means: float[b c k h] twice, block means of the keys and of the values.
      gates: float[b s n 3] in the order of the branches; not negative.
      compressed: out and lse of the compressed branch over these means. They carry no gradient:
        that of the branch is made here.
      masks: `BranchMasks`.
      configs: `BranchConfigs`.

    Returns:
      float[b s n h], dtype of `q`; 0 where pos is -1.
    """
    window = flash.forward(q, k, v, masks.window, configs.window)
    gated = gates, compressed[0], window[0]  # one kernel adds the branches up
    return selected_attention.forward(q, k, v, masks.selected, configs.selected, gated)[0]


def _forward(q, k, v, means, gates, compressed, masks, configs):
    selected = selected_attention.forward(q, k, v, masks.selected, configs.selected)
    window = flash.forward(q, k, v, masks.window, configs.window)
    branches = compressed, selected, window
    out = combine(gates, [branch for branch, _ in branches], masks.selected.pos)
    return out, (q, k, v, means, gates, branches, masks)


def _backward(configs, residuals, dout):
    q, k, v, means, gates, branches, masks = residuals
    outs, lses = zip(*branches, strict=True)
    dgates = triton_gate_grads.gate_gradients(
        dout, outs, masks.selected.pos, interpret=configs.selected.interpret
    )
    lses = [triton_gate_grads.gated(lse, gates[..., i]) for i, lse in enumerate(lses)]
    deltas = [dgates[..., i] for i in range(3)]
    dq_compressed, *dmeans = flash_bwd.gradients(
        q, *means, masks.compressed, lses[0], deltas[0], dout, configs.compressed
    )
    rows = q, dout, lses[1], deltas[1]
    dq_selected, *dselected = selected_bwd.gradients(rows, k, v, masks.selected, configs.selected)
    dq_window, *dwindow = flash_bwd.gradients(
        q, k, v, masks.window, lses[2], deltas[2], dout, configs.window
    )
    dq = _sum(dq_compressed, dq_selected, dq_window)
    dk, dv = map(_sum, dselected, dwindow)
    return dq, dk, dv, tuple(dmeans), dgates.astype(gates.dtype), None, None


gated_attention.defvjp(_forward, _backward)


def _sum(*grads):
    """In float32, rounded once."""
    return sum(x.astype(jnp.float32) for x in grads).astype(grads[0].dtype)
