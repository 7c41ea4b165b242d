"""Linear maps, norms and feed-forward blocks, optionally stacked over layers on axis 0.

A stacked module's parameters have a leading layer axis; `lax.scan` hands one layer's slice to the
same `__call__`. Parameters are float32; each call computes in the dtype of its input.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import BLOCKS
from videonsa_jax.config.schema import LoRAConfig

NO_LORA = LoRAConfig()
INIT_STDDEV = 0.02  # of every kernel and embedding, as published


def normal_param(shape: tuple[int, ...], axes: tuple, *, rngs: nnx.Rngs) -> nnx.Param:
    """A float32 parameter drawn from N(0, 0.02**2), with one logical axis name per dimension."""
    value = INIT_STDDEV * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, logical_axes=axes)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank change of a kernel: scale x lora_in[inputs rank] lora_out[rank outputs]."""

    rank: int
    scale: float

    @classmethod
    def of(cls, lora: LoRAConfig, target: str) -> "Adapter | None":
        """That of a projection, if it has one."""
        has_one = lora.rank and target in lora.targets
        return cls(lora.rank, lora.alpha / lora.rank) if has_one else None


class Linear(nnx.Module):
    """y[... outputs] = x[... inputs] kernel[inputs outputs] (+ bias[outputs]) (+ its adapter)."""

    def __init__(
        self,
        inputs: tuple[tuple[str | None, int], ...],
        outputs: tuple[tuple[str | None, int], ...],
        *,
        bias: bool = False,
        layers: int | None = None,
        adapter: Adapter | None = None,
        rngs: nnx.Rngs,
    ):
        """`inputs` and `outputs` are (logical axis, size) per dimension."""
        stack = () if layers is None else (("layers", layers),)
        self.num_inputs, self.adapter = len(inputs), adapter
        axes, shape = zip(*stack, *inputs, *outputs, strict=True)
        self.kernel = normal_param(shape, axes, rngs=rngs)
        if adapter is not None:
            low = (None, adapter.rank)
            axes, shape = zip(*stack, *inputs, low, strict=True)
            self.lora_in = normal_param(shape, axes, rngs=rngs)
            axes, shape = zip(*stack, low, *outputs, strict=True)
            self.lora_out = nnx.Param(jnp.zeros(shape, jnp.float32), logical_axes=axes)
        if bias:
            axes, shape = zip(*stack, *outputs, strict=True)
            self.bias = nnx.Param(jnp.zeros(shape, jnp.float32), logical_axes=axes)
        else:
            self.bias = None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, self.kernel[...].astype(x.dtype), axes=self.num_inputs)
        if self.adapter is not None:
            low = jnp.tensordot(x, self.lora_in[...].astype(x.dtype), axes=self.num_inputs)
            low = self.adapter.scale * low
            y = y + jnp.tensordot(low, self.lora_out[...].astype(x.dtype), axes=1)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis; statistics in float32."""

    def __init__(self, size: int, *, eps: float, layers: int | None = None):
        stack = () if layers is None else (layers,)
        self.eps = eps
        self.scale = nnx.Param(
            jnp.ones((*stack, size), jnp.float32),
            logical_axes=(*("layers" for _ in stack), None),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...]).astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        bias: bool,
        layers: int,
        lora: LoRAConfig = NO_LORA,
        rngs: nnx.Rngs,
    ):
        wide, narrow = (("mlp", d_ff),), (("embed", d_model),)

        def linear(inputs, outputs, name):
            adapter = Adapter.of(lora, name)
            return Linear(inputs, outputs, bias=bias, layers=layers, adapter=adapter, rngs=rngs)

        self.gate = linear(narrow, wide, "gate")
        self.up = linear(narrow, wide, "up")
        self.down = linear(wide, narrow, "down")

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Embedding(nnx.Module):
    """One vector per token id; tied heads read the same table."""

    def __init__(self, vocab_size: int, d_model: int, *, rngs: nnx.Rngs):
        self.embedding = normal_param((vocab_size, d_model), ("vocab", "embed"), rngs=rngs)

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """i32[...] -> dtype[... d]."""
        return self.embedding[...][tokens].astype(dtype)


_BLOCKS = jax.checkpoint_policies.save_only_these_names(BLOCKS)
_REMAT = {  # what a layer's backward pass may reuse instead of recomputing
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _BLOCKS
    ),
    "save_selection": _BLOCKS,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def scan_layers(stack: nnx.Module, body, carry, per_layer=None, *, remat: str):
    """Runs `carry = body(layer, carry, per_layer[i])` over the layers of a stacked module.

    Args:
      stack: module whose parameters all have the layer axis first.
      body: (one layer's module, carry, its slice of `per_layer`) -> carry.
      carry: pytree of arrays.
      per_layer: pytree of arrays with the layer axis first.
      remat: "none", "dots", "save_selection" or "full", see `ComputeConfig`.
    """
    graphdef, params = nnx.split(stack)

    def step(carry, layer):
        params, extra = layer
        return body(nnx.merge(graphdef, params), carry, extra), None

    if remat != "none":
        step = jax.checkpoint(step, prevent_cse=False, policy=_REMAT[remat])
    return jax.lax.scan(step, carry, (params, per_layer))[0]
