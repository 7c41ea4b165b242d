"""Native sparse attention on NVIDIA GPUs: the three branches differentiated as one operation.

Alone, each branch would get its gate times the upstream gradient as an array of its own. Here one
pass makes the gradients of the gates, which are also what the softmax gradients need, and all
branches run on the upstream gradient itself (see `triton_gates.py`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse.block_set import BlockSet
from pallas_kernels.compressed_attention import triton as compressed_attention
from pallas_kernels.flash_attention import triton as triton_flash
from pallas_kernels.flash_attention import triton_bwd as triton_flash_backward
from pallas_kernels.flash_attention.xla_tiles import Sight
from pallas_kernels.nsa_attention import triton_gate_grads as triton_gates
from pallas_kernels.nsa_attention.gating import combine
from pallas_kernels.selected_attention import triton as selected_attention
from pallas_kernels.selected_attention import triton_bwd as selected_backward
from pallas_kernels.window_attention import triton as window_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """What each query sees.

    Attributes:
      visible: i32[b s 2] half-open range of block means.
      blocks: the selected `BlockSet`.
      start: i32[b s] first key of its sequence.
      pos: i32[b s] its own key, the last that it may see; -1 for a query that sees nothing.
    """

    visible: jax.Array
    blocks: BlockSet
    start: jax.Array
    pos: jax.Array


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static: the keys of a window, the factor of the logits, the interpreter."""

    window: int
    scale: float
    interpret: bool

    def jobs(self):
        """Of the compressed and of the window branch."""
        return (
            compressed_attention.job(self.scale, self.interpret),
            window_attention.job(self.window, self.scale, self.interpret),
        )


@functools.partial(jax.custom_vjp, nondiff_argnames=("settings",))
def gated_attention(q, k, v, means, gates, compressed, places, settings):
    """The gated sum of the compressed, the selected and the window branch.

    Args:
      q: float[b s n h] queries.
      k: float[b t k h] keys.
      v: float[b t k h] values.
      means: float[b c k h] twice, block means of the keys and of the values.
      gates: float[b s n 3] in the order of the branches; not negative.
      compressed: out and lse of the compressed branch over these means. They carry no gradient:
        that of the branch is made here.
      places: what each query sees.
      settings: what is static.

    Returns:
      float[b s n h], dtype of `q`; 0 where pos is -1.
    """
    gated = gates, compressed[0], _window(q, k, v, places, settings)[0]
    return _selected(q, k, v, places, gated, settings)[0]  # one kernel adds the branches up


def _forward(q, k, v, means, gates, compressed, places, settings):
    selected = _selected(q, k, v, places, (), settings)
    branches = compressed, selected, _window(q, k, v, places, settings)
    out = combine(gates, [branch for branch, _ in branches], places.pos)
    return out, (q, k, v, means, gates, branches, places)


def _backward(settings, residuals, dout):
    q, k, v, means, gates, branches, places = residuals
    outs, lses = zip(*branches, strict=True)
    dgates = triton_gates.gate_gradients(dout, outs, places.pos, interpret=settings.interpret)
    lses = [triton_gates.gated(lse, gates[..., i]) for i, lse in enumerate(lses)]
    deltas = [dgates[..., i] for i in range(3)]
    jobs = settings.jobs()
    visible = Sight.of_blocks(places.visible)
    dq_compressed, *dmeans = triton_flash_backward.gradients(
        q, *means, visible, lses[0], deltas[0], dout, jobs[0]
    )
    dq_selected, *dselected = selected_backward.gradients(
        (q, dout, lses[1], deltas[1]),
        k,
        v,
        places.blocks,
        places.pos,
        scale=settings.scale,
        interpret=settings.interpret,
    )
    nearby = Sight.of_window(places.start, places.pos, settings.window)
    dq_window, *dwindow = triton_flash_backward.gradients(
        q, k, v, nearby, lses[2], deltas[2], dout, jobs[1]
    )
    dq = _sum(dq_compressed, dq_selected, dq_window)
    dk, dv = map(_sum, dselected, dwindow)
    return dq, dk, dv, tuple(dmeans), dgates.astype(gates.dtype), None, None


gated_attention.defvjp(_forward, _backward)


def _selected(q, k, v, places, gated, settings):
    """See `selected_attention.triton.forward`."""
    how = {"scale": settings.scale, "interpret": settings.interpret}
    return selected_attention.forward(q, k, v, places.blocks, places.pos, gated, **how)


def _window(q, k, v, places, settings):
    """out and lse of the window branch."""
    nearby = Sight.of_window(places.start, places.pos, settings.window)
    return triton_flash.attend(q, k, v, nearby, settings.jobs()[1])


def _sum(*parts):
    """In float32, rounded once."""
    return sum(x.astype(jnp.float32) for x in parts).astype(parts[0].dtype)
