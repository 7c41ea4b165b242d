"""What one step of a tile does: fetch key blocks, multiply, mask, add back."""

import jax
import jax.numpy as jnp


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
    """Blocks [c w h] -> the keys [fetch*w h] of blocks `ids`; None: all of them."""
    if ids is not None:
        blocks = blocks.at[ids].get(mode="promise_in_bounds")
    return blocks.reshape(-1, blocks.shape[-1])


def add(blocks, ids, update):
    """The transpose of `fetch`: adds keys [fetch*w h] to blocks `ids`."""
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
