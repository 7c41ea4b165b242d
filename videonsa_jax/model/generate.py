"""Generation with a KV cache: prefill, one decoding step, and the loop over both.

One sequence per row. A new token is text: it sees every cached key, whatever the attention mode.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from videonsa_jax.batch import Batch, Cache
from videonsa_jax.model.model import VideoNSA


def prefill(model: VideoNSA, batch: Batch, max_new_tokens: int) -> tuple[jax.Array, Cache]:
    """Runs the prompts and leaves room for `max_new_tokens` more.

    Args:
      model: weights and sizes.
      batch: one prompt per row.
      max_new_tokens: how many `decode_step`s the cache must take.

    Returns:
      logits: f32[b v] at each row's last token, which may be an image's or a video's.
      cache: the prompts' keys and values.
    """
    rows, text_slots = batch.text_tokens.shape
    slots = batch.vision_order.shape[1] + text_slots + max_new_tokens
    hidden, cache = model(batch, _empty_cache(model, rows, slots))
    return model.logits(hidden)[:, 0], cache


def decode_step(model: VideoNSA, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Appends one token per row: i32[b] -> logits f32[b v] of the next one, cache."""
    hidden, cache = model(_text_step(model, tokens, cache), cache)
    return model.logits(hidden)[:, 0], cache


def generate(
    model: VideoNSA,
    batch: Batch,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
    key: jax.Array | None = None,
) -> jax.Array:
    """Continues every row until a stop token or `max_new_tokens`; ends when all rows have ended.

    Args:
      model: weights and sizes.
      batch: one prompt per row.
      max_new_tokens: at least 1.
      temperature: 0 takes the likeliest token; else logits are divided by it and sampled.
      top_p: sample from the smallest set of tokens whose probabilities sum to at least this.
      stop_tokens: ids that end a row.
      key: PRNG key, needed to sample.

    Returns:
      i32[b max_new_tokens]; a row's stop token is included, then zeros.

    Raises:
      ValueError: sampling without a key, or a setting outside its range.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"{max_new_tokens=} must be at least 1, {temperature=} at least 0, {top_p=} in (0, 1]"
        )
    if temperature > 0 and key is None:
        raise ValueError(f"{temperature=} samples and needs `key`; temperature 0 is greedy")
    graphdef, params = nnx.split(model)
    key = jax.random.key(0) if key is None else key
    return _generate(
        graphdef, params, batch, key, max_new_tokens, temperature, top_p, tuple(stop_tokens)
    )


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
def _generate(graphdef, params, batch, key, max_new_tokens, temperature, top_p, stop_tokens):
    model = nnx.merge(graphdef, params)
    logits, cache = prefill(model, batch, max_new_tokens)
    rows = logits.shape[0]

    def unfinished(state):
        step, finished, *_ = state
        return (step < max_new_tokens) & ~jnp.all(finished)

    def step(state):
        index, finished, out, logits, cache = state
        tokens = choose_tokens(
            logits, jax.random.fold_in(key, index), temperature=temperature, top_p=top_p
        )
        tokens = jnp.where(finished, 0, tokens)
        finished |= jnp.isin(tokens, jnp.array(stop_tokens, jnp.int32))
        logits, cache = decode_step(model, tokens, cache)
        return index + 1, finished, out.at[:, index].set(tokens), logits, cache

    out = jnp.zeros((rows, max_new_tokens), jnp.int32)
    state = (jnp.int32(0), jnp.zeros(rows, bool), out, logits, cache)
    return jax.lax.while_loop(unfinished, step, state)[2]


def choose_tokens(
    logits: jax.Array, key: jax.Array, *, temperature: float, top_p: float
) -> jax.Array:
    """f32[b v] -> i32[b]: the likeliest token (temperature 0) or a sample, see `generate`."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of the likelier tokens
        lowest = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _empty_cache(model: VideoNSA, rows: int, slots: int) -> Cache:
    text = model.cfg.text
    shape = (text.num_layers, rows, slots, text.num_kv_heads, text.head_dim)
    return Cache(
        keys=jnp.zeros(shape, model.compute.dtype),
        values=jnp.zeros(shape, model.compute.dtype),
        key_order=jnp.full((rows, slots), -1, jnp.int32),
        next_slot=jnp.int32(0),
        next_order=jnp.zeros(rows, jnp.int32),
        next_position=jnp.zeros(rows, jnp.int32),
    )


def _text_step(model: VideoNSA, tokens: jax.Array, cache: Cache) -> Batch:
    """A batch of one text token per row, placed after the cached ones; no vision slots."""
    rows = tokens.shape[0]
    empty = jnp.zeros((rows, 0), jnp.int32)
    pairs = jnp.zeros((rows, 0, 2), jnp.int32)
    one = tokens[:, None]
    return Batch(
        text_tokens=one,
        text_targets=jnp.zeros_like(one),
        text_weights=jnp.zeros(one.shape, jnp.float32),
        text_positions=jnp.repeat(cache.next_position[:, None, None], 3, axis=-1),
        text_order=cache.next_order[:, None],
        text_start=jnp.zeros_like(one),
        vision_positions=jnp.zeros((rows, 0, 3), jnp.int32),
        vision_order=empty,
        vision_start=empty,
        vision_segment=empty,
        vision_slot=empty,
        patches=jnp.zeros((rows, 0, model.cfg.vision.patch_elements), jnp.float32),
        patch_positions=pairs,
        patch_window=pairs,
        patch_frame=pairs,
        frame_patches=model.cfg.vision.window_patches,
    )
