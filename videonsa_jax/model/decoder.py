"""The text decoder: embeddings, hybrid attention layers, head. Both streams pass every layer."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from videonsa_jax.batch import Batch, Cache
from videonsa_jax.config.schema import ComputeConfig, ModelConfig, PositionAdvance
from videonsa_jax.model import attention, context_parallel
from videonsa_jax.model.attention import Attention, Places, Streams
from videonsa_jax.model.context_parallel import Shards
from videonsa_jax.model.gates import BranchGates
from videonsa_jax.model.layers import Embedding, Linear, RMSNorm, SwiGLU, scan_layers
from videonsa_jax.model.released import attention as released
from videonsa_jax.model.released.layout import plan
from videonsa_jax.model.rope import mrope_angles
from videonsa_jax.sharding.rules import Rules


class DecoderLayer(nnx.Module):
    """Pre-norm hybrid attention and feed-forward."""

    def __init__(self, cfg: ModelConfig, *, rules: Rules, rngs: nnx.Rngs):
        text, layers = cfg.text, cfg.text.num_layers
        self.cfg, self.rules = cfg, rules
        self.attn_norm = RMSNorm(text.d_model, eps=text.norm_eps, layers=layers)
        self.attn = Attention(text, layers=layers, lora=cfg.lora, rngs=rngs)
        self.gates = BranchGates(cfg, layers=layers, rngs=rngs)  # unused in dense mode
        self.mlp_norm = RMSNorm(text.d_model, eps=text.norm_eps, layers=layers)
        self.mlp = SwiGLU(
            text.d_model, text.d_ff, bias=False, layers=layers, lora=cfg.lora, rngs=rngs
        )

    def __call__(
        self,
        x: Streams,
        places: Places,
        cache: Cache | None,
        layer: jax.Array,
        compute: ComputeConfig,
    ) -> tuple[Streams, Cache | None]:
        """f[b . d] -> f[b . d]; `cache` gets the keys and values of layer number `layer`."""
        normed = jax.tree.map(self.attn_norm, x)
        queries, keys, values = self.attn.project(normed, places.angles)
        context = None
        if cache is not None:
            cache, context = _store(cache, layer, keys.joined(), values.joined())
        gates = None if self.cfg.attention == "dense" else self.gates(normed.vision)
        mix = self._mix(compute, has_vision=x.vision.shape[1] > 0, has_cache=cache is not None)
        mixed = mix(queries, keys, values, context, gates, places)
        x = jax.tree.map(lambda x, mixed: x + self.attn.o(mixed), x, mixed)
        return jax.tree.map(lambda x: x + self.mlp(self.mlp_norm(x)), x), cache

    def _mix(
        self, compute: ComputeConfig, *, has_vision: bool, has_cache: bool
    ) -> Callable[..., Streams]:
        """Attention of the layer, each device on its own rows, heads and part of the sequence."""
        cfg, rules = self.cfg, self.rules
        is_released = cfg.attention == "released"
        # Released heads read other KV heads than their own, so they cannot be split; its attention
        # runs over the joined streams. Text alone is decoding.
        whole_heads = is_released or rules.act_heads != rules.kv_heads
        axis = rules.devices("seq") if has_vision and not is_released else None
        seq = _split(has_cache=has_cache) if axis else Streams(None, None)
        heads = (None, None) if whole_heads else ("act_heads", "kv_heads")
        queries, keys = (Streams(*(("batch", x, head) for x in seq)) for head in heads)
        stored, gates = ("batch", None, heads[1]), queries.vision
        in_axes = (queries, keys, keys, stored, gates, _place_axes(seq))

        def mix(queries, keys, values, context, gates, places):
            inputs = {"context": context, "gates": gates, "places": places, "cfg": cfg}
            if axis is not None:
                shards = Shards(axis, compute.cp_mode, compute.implementation)
                return context_parallel.attend(queries, keys, values, **inputs, shards=shards)
            if context is None:
                inputs["context"] = keys.joined(), values.joined()
            attend = released.attend if is_released else attention.attend
            return attend(queries, keys, values, **inputs, implementation=compute.implementation)

        return rules.shard_op(mix, in_axes, queries)


def _split(*, has_cache: bool) -> Streams:
    """The logical axis of each stream's tokens: cached keys lie whole on every device, and so do
    the few tokens of text that read them.
    """
    return Streams("seq", None if has_cache else "seq")


def _place_axes(seq: Streams) -> Places:
    """Logical axes of `Places`: of the queries' as theirs, of the keys' for all keys."""
    queries = Streams(*(("batch", axis) for axis in seq))
    keys = ("batch",)
    return Places(queries, queries, queries, vision_segment=keys, key_order=keys, released=keys)


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
        """Vision features f[b r d] and the batch's text -> hidden, cache; as `VideoNSA` says."""
        seq = _split(has_cache=cache is not None)
        x, order = self._embedded(vision, batch, seq), Streams(batch.vision_order, batch.text_order)
        if cache is not None:
            positions = Streams(batch.vision_positions, batch.text_positions)
            cache = _advance(cache, order, positions, self.cfg.position_advance)
        places = self.places(batch, cache)

        def layer(module, carry, index):
            x, cache = carry
            x = Streams(*(self._pinned(x, axis) for x, axis in zip(x, seq, strict=True)))
            return module(x, places, cache, index, self.compute)

        index = jnp.arange(self.cfg.text.num_layers)
        x, cache = scan_layers(self.layers, layer, (x, cache), index, remat=self.compute.remat)
        if cache is None:
            return self.norm(x.text), None
        cache = dataclasses.replace(cache, next_slot=cache.next_slot + order.joined().shape[1])
        return self.norm(_last(x, order)), cache

    def embedded(self, vision: jax.Array, batch: Batch) -> Streams:
        """What the first layer gets: vision features f[b r d] and embedded text f[b s d]."""
        return self._embedded(vision, batch, _split(has_cache=False))

    def _pinned(self, x: jax.Array, seq: str | None) -> jax.Array:
        return self.rules.constrain(x, "batch", seq, None)

    def _embedded(self, vision: jax.Array, batch: Batch, seq: Streams) -> Streams:
        def table(tokens):
            return self.embed(tokens, self.compute.dtype)

        return Streams(vision, self.rules.lookup(table, batch.text_tokens, "batch", seq.text))

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


def _last(x: Streams, order: Streams) -> jax.Array:
    """f[b . d] -> f[b 1 d] of each row's last token, in whichever stream it is.

    As a sum, devices that share a stream each look through their part of it.
    """
    last = order.joined().max(axis=1)[:, None]
    chosen = (
        jnp.where((order == last)[..., None], x, 0).sum(axis=1, keepdims=True)
        for x, order in zip(x, order, strict=True)
    )
    return sum(chosen)


def _advance(cache: Cache, order: Streams, positions: Streams, advance: PositionAdvance) -> Cache:
    """Enters the tokens at hand in the cache's book-keeping, all but `next_slot`.

    The next rotary id is one past the largest so far, as `data.positions` would give it: of all
    three axes, or of height and width alone, which a long video's times may have run past.
    """
    axes = slice(1, None) if advance == "spatial" else slice(None)
    order, positions = order.joined(), positions.joined()[..., axes].max(axis=-1)
    last = jnp.where(order >= 0, positions, -1).max(axis=1)
    return dataclasses.replace(
        cache,
        key_order=jax.lax.dynamic_update_slice(cache.key_order, order, (0, cache.next_slot)),
        next_order=jnp.maximum(cache.next_order, order.max(axis=1) + 1),
        next_position=jnp.maximum(cache.next_position, last + 1),
    )
