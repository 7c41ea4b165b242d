"""The vision tower: patches -> features of merged tokens, in window order throughout."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import interval_attention
from videonsa_jax.batch import Batch
from videonsa_jax.config.schema import ComputeConfig, VisionConfig
from videonsa_jax.model.layers import Linear, RMSNorm, SwiGLU, scan_layers
from videonsa_jax.model.rope import grid_angles, rotate
from videonsa_jax.sharding.rules import Rules


class VisionAttention(nnx.Module):
    """Bidirectional attention inside a window or a frame."""

    def __init__(self, cfg: VisionConfig, *, layers: int, rngs: nnx.Rngs):
        width = (("embed", cfg.d_model),)
        heads = (("heads", cfg.num_heads), (None, cfg.d_model // cfg.num_heads))
        self.qkv = Linear(width, ((None, 3), *heads), bias=True, layers=layers, rngs=rngs)
        self.o = Linear(heads, width, bias=True, layers=layers, rngs=rngs)

    def __call__(self, x: jax.Array, angles: jax.Array, attention) -> jax.Array:
        """f[b p d] -> f[b p d]; `attention` maps rotated q, k and v, f[b p n h] each, to out."""
        queries, keys, values = jnp.moveaxis(self.qkv(x), 2, 0)
        return self.o(attention(rotate(queries, angles), rotate(keys, angles), values))


class VisionLayer(nnx.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, cfg: VisionConfig, *, layers: int, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(cfg.d_model, eps=cfg.norm_eps, layers=layers)
        self.attn = VisionAttention(cfg, layers=layers, rngs=rngs)
        self.mlp_norm = RMSNorm(cfg.d_model, eps=cfg.norm_eps, layers=layers)
        self.mlp = SwiGLU(cfg.d_model, cfg.d_ff, bias=True, layers=layers, rngs=rngs)

    def __call__(self, x: jax.Array, angles: jax.Array, attention) -> jax.Array:
        x = x + self.attn(self.attn_norm(x), angles, attention)
        return x + self.mlp(self.mlp_norm(x))


class Merger(nnx.Module):
    """Joins merge_size**2 neighbouring patches into one token of the text model's width."""

    def __init__(self, cfg: VisionConfig, out_size: int, *, rngs: nnx.Rngs):
        self.group = cfg.merge_size**2
        joined = cfg.d_model * self.group
        self.norm = RMSNorm(cfg.d_model, eps=cfg.norm_eps)
        self.hidden = Linear((("embed", joined),), (("mlp", joined),), bias=True, rngs=rngs)
        self.out = Linear((("mlp", joined),), (("embed", out_size),), bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """f[b p d] -> f[b p/4 out_size] for merge size 2."""
        b, p, d = x.shape
        x = self.norm(x).reshape(b, p // self.group, self.group * d)
        return self.out(jax.nn.gelu(self.hidden(x), approximate=False))


class VisionTower(nnx.Module):
    """Patch embedding, transformer layers, merger."""

    def __init__(
        self,
        cfg: VisionConfig,
        out_size: int,
        *,
        compute: ComputeConfig,
        rules: Rules,
        rngs: nnx.Rngs,
    ):
        self.cfg, self.out_size, self.compute, self.rules = cfg, out_size, compute, rules
        patch = ((None, cfg.patch_elements),)
        self.patch = Linear(patch, (("embed", cfg.d_model),), rngs=rngs)
        self.layers = VisionLayer(cfg, layers=cfg.num_layers, rngs=rngs)
        self.merger = Merger(cfg, out_size, rngs=rngs)

    @jax.named_scope("vision_tower")
    def __call__(self, batch: Batch) -> jax.Array:
        """Features of merged vision tokens in sequence order, f[b r out_size]."""
        cfg = self.cfg
        if batch.patches.shape[1] == 0:
            return jnp.zeros((*batch.vision_slot.shape, self.out_size), self.compute.dtype)
        x = self.patch(batch.patches.astype(self.compute.dtype))
        angles = grid_angles(batch.patch_positions, cfg.d_model // cfg.num_heads, cfg.rope_theta)

        mix = self._mix(batch.frame_patches)

        def layer(module, x, is_full):
            def attention(*qkv):
                return mix(is_full, batch.patch_window, batch.patch_frame, *qkv)

            x = self.rules.constrain(x, "batch", "seq", None)
            return module(x, angles, attention)

        is_full = jnp.isin(jnp.arange(cfg.num_layers), jnp.array(cfg.full_attention_layers))
        x = scan_layers(self.layers, layer, x, is_full, remat=self.compute.remat)
        return self._in_sequence(self.merger(x), batch)

    def _mix(self, frame_patches: int):
        """Attention of a layer, each device on its own rows, heads and patches."""
        cfg, axis = self.cfg, self.rules.mesh_axis("seq")
        attention = functools.partial(
            interval_attention, implementation=self.compute.implementation
        )

        def attend(is_full, windows, frames, *qkv):
            def in_windows(*qkv):
                return attention(*qkv, interval=windows, max_length=cfg.window_patches)

            def in_frames(*qkv):
                return attention(*qkv, interval=frames, max_length=frame_patches)

            return jax.lax.cond(is_full, in_frames, in_windows, *qkv)

        def attend_part(is_full, windows, frames, queries, keys, values):
            # The first and the last frame of a part may begin or end on another device.
            reach, count = frame_patches - 1, queries.shape[1]
            first = axis.index() * count - reach
            keys, values = (
                axis.halo_exchange(x, before=reach, after=reach) for x in (keys, values)
            )
            windows, frames = (jnp.maximum(x - first, 0) for x in (windows, frames))
            # Where keys are of other devices, queries see nothing.
            windows, frames, queries = (_framed(x, reach) for x in (windows, frames, queries))
            out = attend(is_full, windows, frames, queries, keys, values)
            return out[:, reach : reach + count]

        patches = "batch", "seq"
        heads = (*patches, "act_heads")
        op = attend if axis is None else attend_part
        return self.rules.shard_op(op, ((), patches, patches, heads, heads, heads), heads)

    def _in_sequence(self, merged: jax.Array, batch: Batch) -> jax.Array:
        """Merged tokens f[b r d] from window order to sequence order, the same within a frame."""
        axis = self.rules.mesh_axis("seq")
        reach = -(-batch.frame_patches // self.cfg.merge_size**2) - 1

        def take(merged, slot):
            if axis is not None:
                slot = slot - axis.index() * slot.shape[1] + reach
                merged = axis.halo_exchange(merged, before=reach, after=reach)
            return jnp.take_along_axis(merged, slot[..., None], axis=1)

        tokens = "batch", "seq"
        return self.rules.shard_op(take, (tokens, tokens), tokens)(merged, batch.vision_slot)


def _framed(x: jax.Array, count: int) -> jax.Array:
    """[b p ...] with `count` zeros on both sides of p."""
    return jnp.pad(x, ((0, 0), (count, count), *((0, 0),) * (x.ndim - 2)))
