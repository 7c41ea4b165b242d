"""The text decoder: embeddings, hybrid attention layers, head. Both streams pass every layer."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from videonsa_jax import attention
from videonsa_jax.attention import Attention, Places, Streams
from videonsa_jax.batch import Batch, Cache
from videonsa_jax.config import ComputeConfig, ModelConfig
from videonsa_jax.gates import BranchGates
from videonsa_jax.layers import Embedding, Linear, RMSNorm, SwiGLU, scan_layers
from videonsa_jax.released import attention as released
from videonsa_jax.released.layout import plan
from videonsa_jax.rope import mrope_angles
from videonsa_jax.sharding.rules import Rules


class DecoderLayer(nnx.Module):
    """Pre-norm hybrid attention and feed-forward."""

    def __init__(self, cfg: ModelConfig, *, rules: Rules, rngs: nnx.Rngs):
        text, layers = cfg.text, cfg.text.num_layers
        self.cfg, self.rules = cfg, rules
        self.attn_norm = RMSNorm(text.d_model, eps=text.norm_eps, layers=layers)
        self.attn = Attention(text, layers=layers, rngs=rngs)
        self.gates = BranchGates(cfg, layers=layers, rngs=rngs)  # unused in dense mode
        self.mlp_norm = RMSNorm(text.d_model, eps=text.norm_eps, layers=layers)
        self.mlp = SwiGLU(text.d_model, text.d_ff, bias=False, layers=layers, rngs=rngs)

    def __call__(
        self,
        x: Streams,
        places: Places,
        cache: Cache | None,
        layer: jax.Array,
        implementation: str | None,
    ) -> tuple[Streams, Cache | None]:
        """f[b . d] -> f[b . d]; `cache` gets the keys and values of layer number `layer`."""
        normed = jax.tree.map(self.attn_norm, x)
        queries, keys, values = self.attn.project(normed, places.angles)
        context = (keys.joined(), values.joined())
        if cache is not None:
            cache, context = _store(cache, layer, *context)
        gates = None if self.cfg.attention == "dense" else self.gates(normed.vision)
        mixed = self._mix(implementation)(queries, keys, values, context, gates, places)
        x = jax.tree.map(lambda x, mixed: x + self.attn.o(mixed), x, mixed)
        return jax.tree.map(lambda x: x + self.mlp(self.mlp_norm(x)), x), cache

    def _mix(self, implementation: str | None) -> Callable[..., Streams]:
        """Attention of the layer, each device on its own rows and heads."""
        cfg, rules = self.cfg, self.rules
        attend = released.attend if cfg.attention == "released" else attention.attend
        # Released heads read other KV heads than their own, so they cannot be split.
        whole = cfg.attention == "released" or rules.act_heads != rules.kv_heads
        queries, keys = (
            ("batch", None, None if whole else heads) for heads in ("act_heads", "kv_heads")
        )

        def mix(queries, keys, values, context, gates, places):
            return attend(
                queries,
                keys,
                values,
                context=context,
                gates=gates,
                places=places,
                cfg=cfg,
                implementation=implementation,
            )

        in_axes = (queries, keys, keys, keys, queries, ("batch",))
        return rules.shard_op(mix, in_axes, queries)


def _store(cache: Cache, layer: jax.Array, keys: jax.Array, values: jax.Array):
    """Writes f[b t k h] at the cache's next slot; returns the cache and the layer's contents."""
    at = (layer, 0, cache.next_slot, 0, 0)
    cache = dataclasses.replace(
        cache,
        keys=jax.lax.dynamic_update_slice(cache.keys, keys[None], at),
        values=jax.lax.dynamic_update_slice(cache.values, values[None], at),
    )
    return cache, (cache.keys[layer], cache.values[layer])


class TextDecoder(nnx.Module):
    """Token embedding, decoder layers, final norm and head."""

    def __init__(self, cfg: ModelConfig, *, compute: ComputeConfig, rules: Rules, rngs: nnx.Rngs):
        self.cfg, self.compute, self.rules = cfg, compute, rules
        text = cfg.text
        self.embed = Embedding(text.vocab_size, text.d_model, rngs=rngs)
        self.layers = DecoderLayer(cfg, rules=rules, rngs=rngs)
        self.norm = RMSNorm(text.d_model, eps=text.norm_eps)
        if not text.tie_embeddings:
            inputs, outputs = (("embed", text.d_model),), (("vocab", text.vocab_size),)
            self.head = Linear(inputs, outputs, rngs=rngs)

    @jax.named_scope("text_decoder")
    def __call__(
        self, vision: jax.Array, batch: Batch, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Vision features f[b r d] and the batch's text -> hidden f[b s d] of the text, cache."""
        x, order = self.embedded(vision, batch), Streams(batch.vision_order, batch.text_order)
        if cache is not None:
            cache = _advance(cache, order, Streams(batch.vision_positions, batch.text_positions))
        places = self.places(batch, cache)

        def layer(module, carry, index):
            x, cache = carry
            x = jax.tree.map(lambda x: self.rules.constrain(x, "batch", "seq", None), x)
            return module(x, places, cache, index, self.compute.implementation)

        index = jnp.arange(self.cfg.text.num_layers)
        x, cache = scan_layers(self.layers, layer, (x, cache), index, remat=self.compute.remat)
        if cache is not None:
            cache = dataclasses.replace(cache, next_slot=cache.next_slot + order.joined().shape[1])
        return self.norm(x.text), cache

    def embedded(self, vision: jax.Array, batch: Batch) -> Streams:
        """What the first layer gets: vision features f[b r d] and embedded text f[b s d]."""
        return Streams(vision, self.embed(batch.text_tokens, self.compute.dtype))

    def places(self, batch: Batch, cache: Cache | None) -> Places:
        """Where the batch's tokens are; `cache`, if any, has them entered."""
        order = Streams(batch.vision_order, batch.text_order)
        released = None
        if self.cfg.attention == "released":
            positions = Streams(batch.vision_positions, batch.text_positions)
            vision_slots = batch.vision_order.shape[1]
            released = plan(order.joined(), positions.joined(), vision_slots, self.cfg)
        return Places(
            angles=Streams(
                self._angles(batch.vision_positions), self._angles(batch.text_positions)
            ),
            order=order,
            start=Streams(batch.vision_start, batch.text_start),
            vision_segment=batch.vision_segment,
            key_order=order.joined() if cache is None else cache.key_order,
            released=released,
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f[... d] -> f32[... v], accumulated in float32."""
        if self.cfg.text.tie_embeddings:
            kernel = self.embed.embedding[...].T
        else:
            kernel = self.head.kernel[...]
        kernel = kernel.astype(hidden.dtype)
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

    def _angles(self, positions: jax.Array) -> jax.Array:
        text = self.cfg.text
        return mrope_angles(positions, text.mrope_section, text.rope_theta)


def _advance(cache: Cache, order: Streams, positions: Streams) -> Cache:
    """Enters the tokens at hand in the cache's book-keeping, all but `next_slot`.

    The next rotary id is one past the largest so far. That continues the text, except where a
    config advances positions as transformers 5 does and a long video's times run past the text:
    generation there goes on after the video's last time, and so it does here.
    """
    order, positions = order.joined(), positions.joined().max(axis=-1)
    last = jnp.where(order >= 0, positions, -1).max(axis=1)
    return dataclasses.replace(
        cache,
        key_order=jax.lax.dynamic_update_slice(cache.key_order, order, (0, cache.next_slot)),
        next_order=jnp.maximum(cache.next_order, order.max(axis=1) + 1),
        next_position=jnp.maximum(cache.next_position, last + 1),
    )
