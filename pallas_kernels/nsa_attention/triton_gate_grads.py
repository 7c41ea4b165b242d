"""The gradients of the gates on NVIDIA GPUs: <upstream gradient, branch> of each branch.

They serve twice. Where out = sum of g_b o_b, the gradient of g_b is <dout, o_b>; and the gradient
of the logits of branch b, of weights p, is g_b p (<dout, v> - <dout, o_b>). With p = exp(s - lse)
the factor g_b moves into the exponent: the kernels of a branch take `dout` itself, and
lse - log(g_b) in place of lse. No array g_b dout is ever written.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.compat import pl, plgpu

ROWS = 64  # per program
NUM_WARPS = 8


def gate_gradients(dout, branches, pos, *, interpret):
    """<dout, branch> of each branch, in one pass over all of them.

    Args:
      dout: float[b s n h].
      branches: three float[b s n h].
      pos: i32[b s]; where it is -1 nothing is read, and the result is 0.
      interpret: run in the interpreter.

    Returns:
      float32[b s n 3].
    """
    b, s, n, h = dout.shape
    rows = b * s * n
    live = jnp.repeat((pos >= 0).reshape(-1), n).astype(jnp.int32)
    run = compat.triton_call(
        _multiply_rows,
        grid=(-(-rows // ROWS),),
        out_shape=jax.ShapeDtypeStruct((rows, 3), jnp.float32),
        num_warps=NUM_WARPS,
        num_stages=1,
        interpret=interpret,
        name="gate_gradients",
    )
    grads = run(live, *(x.reshape(rows, h) for x in (dout, *branches)))
    return grads.reshape(b, s, n, 3)


def gated(lse, gate):
    """lse - log(gate), the lse of weights times the gate; -inf stays. Float32[b s n] both."""
    seen = ~jnp.isneginf(lse)
    return jnp.where(seen, jnp.where(seen, lse, 0) - jnp.log(gate.astype(jnp.float32)), -jnp.inf)


def _multiply_rows(live, dout, *refs):
    """Rows [m h] of one program."""
    *branches, grads = refs
    row = pl.program_id(0) * ROWS + jnp.arange(ROWS)
    real = row < grads.shape[0]
    reads = plgpu.load(live.at[row], mask=real, other=0) > 0
    at = row[:, None], jnp.arange(dout.shape[1])[None]
    load = functools.partial(plgpu.load, mask=reads[:, None], other=0)
    douts = load(dout.at[at]).astype(jnp.float32)
    for i, branch in enumerate(branches):
        value = (douts * load(branch.at[at]).astype(jnp.float32)).sum(1)
        plgpu.store(grads.at[row, i], value, mask=real)
