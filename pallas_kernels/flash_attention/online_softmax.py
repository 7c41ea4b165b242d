"""One step of attention on a tile: fetch key blocks, multiply, mask, add to m, l and o.

Of a row m is the maximum of the logits, l the sum of weights exp(logit - m), o the weighted sum of
values; alpha rescales l and o when m grows.
"""

import jax
import jax.numpy as jnp

LOG2E = 1.4426950408889634  # kernels take exponents of 2: exp(x) is exp2(x LOG2E)


def product(x, y, x_axis, y_axis):
    """Matrix product over one axis of each, accumulated in float32."""
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def finite(lse):
    """0 in place of -inf, so that exp(-inf - lse) is 0 and not NaN."""
    return jnp.where(jnp.isneginf(lse), 0.0, lse)


def fetch(blocks, ids):
    """Blocks [c w h] -> the keys [m*w h] of blocks `ids`; None: all of them."""
    if ids is not None:
        blocks = blocks.at[ids].get(mode="promise_in_bounds")
    return blocks.reshape(-1, blocks.shape[-1])


def add(blocks, ids, update):
    """The transpose of `fetch`: adds keys [m*w h] to blocks `ids`."""
    update = update.reshape(-1, *blocks.shape[1:])
    return blocks + update if ids is None else blocks.at[ids].add(update, mode="promise_in_bounds")


def mask(logits, see, axis):
    """-inf where a query does not see a key; `axis` of the logits runs over heads x queries."""
    shape = list(logits.shape)
    shape[axis : axis + 1] = [-1, see.shape[axis]]
    grouped = logits.reshape(shape)
    return jnp.where(jnp.expand_dims(see, axis), grouped, -jnp.inf).reshape(logits.shape)


def seen(keys, see):
    """Zeros keys [t h] that no query of the tile sees: 0 x NaN must not enter a product."""
    return jnp.where(see.any(0)[:, None], keys, 0)


def shown(weights, see):
    """Weights where a query sees a key, else 0; `see` None: everywhere."""
    return weights if see is None else jnp.where(see, weights, 0.0)


def row_products(x, y):
    """The inner products of rows [... h], in float32."""
    return (x.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1)


def add_keys(state, logits, values):
    """One step of a softmax in base 2: adds keys to (m, l, o).

    Args:
      state: of the keys before, f32[m], f32[m] and f32[m h]; -inf, 0 and 0 at first.
      logits: f32[m t], times LOG2E; -inf where a row does not see a key.
      values: float[t h]; the weights are rounded to its dtype before they multiply it.
    """
    m, l, o = state
    new_m = jnp.maximum(m, logits.max(1))
    base = finite(new_m)
    alpha = jnp.exp2(m - base)
    weights = jnp.exp2(logits - base[:, None])
    o = o * alpha[:, None] + product(weights.astype(values.dtype), values, 1, 0)
    return new_m, l * alpha + weights.sum(1), o
