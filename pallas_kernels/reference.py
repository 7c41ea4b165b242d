"""Softmax attention under an explicit mask: what every `ref.py` differentiates by plain AD."""

import jax
import jax.numpy as jnp

EXACT = jax.lax.Precision.HIGHEST


def masked_attention(q, k, v, see, *, scale):
    """Grouped-query attention in float32; holds the whole [s t] matrix.

    Args:
      q: float[b s n h] queries; query head i reads KV head i // (n // k).
      k: float[b t k h] keys.
      v: float[b t k h] values.
      see: bool, broadcastable to [b k s t]: the keys of each query.
      scale: factor of the logits.

    Returns:
      out float[b s n h], exactly 0 where nothing is seen, dtype of `q`; lse float32[b s n], -inf
      there.
    """
    b, s, n, h = q.shape
    heads = k.shape[2]
    see = jnp.broadcast_to(see, (b, heads, s, k.shape[1]))
    used = see.any(2).swapaxes(1, 2)[..., None]  # [b t k 1]; what nobody sees may be NaN
    live = jnp.repeat(see.any(3).swapaxes(1, 2), n // heads, axis=2)  # [b s n]
    q32 = jnp.where(live[..., None], q, 0).astype(jnp.float32)
    k32, v32 = (jnp.where(used, x, 0).astype(jnp.float32) for x in (k, v))
    q32 = q32.reshape(b, s, heads, n // heads, h)

    logits = jnp.einsum("bskgh,btkh->bkgst", q32, k32, precision=EXACT) * scale
    logits = jnp.where(see[:, :, None], logits, -jnp.inf)
    top = jnp.where(see.any(3)[:, :, None], logits.max(-1), 0.0)  # [b k g s]
    weights = jnp.exp(logits - jax.lax.stop_gradient(top)[..., None])
    total = weights.sum(-1)
    weights = weights / jnp.where(total == 0, 1.0, total)[..., None]
    out = jnp.einsum("bkgst,btkh->bskgh", weights, v32, precision=EXACT)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(jnp.where(total == 0, 1.0, total)))
    return out.reshape(b, s, n, h).astype(q.dtype), jnp.moveaxis(lse, 3, 1).reshape(b, s, n)
