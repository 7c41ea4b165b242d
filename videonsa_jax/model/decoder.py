"""The text decoder: embeddings, hybrid attention layers, head. Both streams pass every layer."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from videonsa_jax.batch import Batch, Cache
from videonsa_jax.config.schema import ComputeConfig, ModelConfig, PositionAdvance
from videonsa_jax.model.attention import Attention, AttentionMetadata, Streams
from videonsa_jax.model.attention_modes import mode_of
from videonsa_jax.model.context_parallel import Shards
from videonsa_jax.model.gates import BranchGates
from videonsa_jax.model.layers import Embedding, Linear, RMSNorm, SwiGLU, scan_layers
from videonsa_jax.model.rope import mrope_angles
from videonsa_jax.sharding.rules import Rules


class DecoderLayer(nnx.Module):
    """Pre-norm hybrid attention and feed-forward."""

    def __init__(self, cfg: ModelConfig, *, rules: Rules, rngs: nnx.Rngs):
        text, layers = cfg.text, cfg.text.num_layers
        self.cfg, self.rules = cfg, rules
        self.attn_norm = RMSNorm(text.d_model, eps=text.norm_eps, layers=layers)
        self.attn = Attention(text, layers=layers, lora=cfg.lora, rngs=rngs)
        self.gates = BranchGates(cfg, layers=layers, rngs=rngs)  # unused in modes without gates
        self.mlp_norm = RMSNorm(text.d_model, eps=text.norm_eps, layers=layers)
        self.mlp = SwiGLU(
            text.d_model, text.d_ff, bias=False, layers=layers, lora=cfg.lora, rngs=rngs
        )

    def __call__(
        self,
        x: Streams,
        metadata: AttentionMetadata,
        cache: Cache | None,
        layer: jax.Array,
        compute: ComputeConfig,
    ) -> tuple[Streams, Cache | None]:
        """f[b . d] -> f[b . d]; `cache` gets the keys and values of layer number `layer`."""
        normed = jax.tree.map(self.attn_norm, x)
        queries, keys, values = self.attn.project(normed, metadata.angles)
        cached_kv = None
        if cache is not None:
            cache, cached_kv = _store(cache, layer, keys.joined(), values.joined())
        gates = self.gates(normed.vision) if mode_of(self.cfg).needs_gates else None
        mix = self._mix(compute, has_vision=x.vision.shape[1] > 0, has_cache=cache is not None)
        mixed = mix(queries, keys, values, cached_kv, gates, metadata)
        x = jax.tree.map(lambda x, mixed: x + self.attn.o(mixed), x, mixed)
        return jax.tree.map(lambda x: x + self.mlp(self.mlp_norm(x)), x), cache

    def _mix(
        self, compute: ComputeConfig, *, has_vision: bool, has_cache: bool
    ) -> Callable[..., Streams]:
        """Attention of the layer, each device on its own rows, heads and part of the sequence."""
        cfg, rules, mode = self.cfg, self.rules, mode_of(self.cfg)
        whole_heads = not mode.splits_heads or rules.act_heads != rules.kv_heads
        # Text alone is decoding.
        axis = rules.mesh_axis("seq") if has_vision and mode.attend_shard else None
        seq = _split(has_cache=has_cache) if axis else Streams(None, None)
        heads = (None, None) if whole_heads else ("act_heads", "kv_heads")
        queries, keys = (Streams(*(("batch", x, head) for x in seq)) for head in heads)
        stored, gates = ("batch", None, heads[1]), queries.vision
        in_axes = (queries, keys, keys, stored, gates, _metadata_axes(seq))

        def mix(queries, keys, values, cached_kv, gates, metadata):
            inputs = {"cached_kv": cached_kv, "gates": gates, "metadata": metadata, "cfg": cfg}
            implementation = compute.implementation
            if axis is not None:
                shards = Shards(axis, compute.cp_mode, implementation)
                return mode.attend_shard(queries, keys, values, **inputs, shards=shards)
            if cached_kv is None:
                inputs["cached_kv"] = keys.joined(), values.joined()
            return mode.attend(queries, keys, values, **inputs, implementation=implementation)

        return rules.shard_op(mix, in_axes, queries)


def _split(*, has_cache: bool) -> Streams:
    """The logical axis of each stream's tokens: cached keys lie whole on every device, and so do
    the few tokens of text that read them.
    """
    return Streams("seq", None if has_cache else "seq")


def _metadata_axes(seq: Streams) -> AttentionMetadata:
    """Logical axes of `AttentionMetadata`: of the queries' as theirs, of the keys' for all keys."""
    queries = Streams(*(("batch", axis) for axis in seq))
    keys = ("batch",)
    return AttentionMetadata(
        queries, queries, queries, vision_segment=keys, key_order=keys, layout=keys
    )


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
        mode_of(cfg)  # an unknown one is an error before anything is made
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
        metadata = self.metadata(batch, cache)

        def layer(module, carry, index):
            x, cache = carry
            x = Streams(*(self._pinned(x, axis) for x, axis in zip(x, seq, strict=True)))
            return module(x, metadata, cache, index, self.compute)

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

    def metadata(self, batch: Batch, cache: Cache | None) -> AttentionMetadata:
        """Where the batch's tokens are; `cache`, if any, has them entered."""
        order = Streams(batch.vision_order, batch.text_order)
        layout, make_layout = None, mode_of(self.cfg).layout
        if make_layout is not None:
            positions = Streams(batch.vision_positions, batch.text_positions)
            vision_slots = batch.vision_order.shape[1]
            layout = make_layout(order.joined(), positions.joined(), vision_slots, self.cfg)
        return AttentionMetadata(
            angles=Streams(
                self._angles(batch.vision_positions), self._angles(batch.text_positions)
            ),
            order=order,
            start=Streams(batch.vision_start, batch.text_start),
            vision_segment=batch.vision_segment,
            key_order=order.joined() if cache is None else cache.key_order,
            layout=layout,
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
