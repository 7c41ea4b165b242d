"""The operations at the target geometry, as functions of abstract arrays: what to compile."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.inputs import FRAME_PATCHES, HEADS, KV_HEADS, TOWER_HEADS, TOWER_WIDTH, WIDTH
from benchmarks.timing.programs import RULE, SPEC
from pallas_kernels import (
    BlockSet,
    compressed_attention,
    dense_attention,
    interval_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)

TEXT = 2048  # text tokens after the video
MOST_PATCHES = 131_072  # a longer video's are split over devices: a v5e could not hold them
TRAINED = (
    "compressed_attention",
    "selected_attention",
    "window_attention",
    "nsa_attention",
    "dense_attention",
    "interval_attention",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation to compile.

    Attributes:
      name: of the operation.
      phase: "forward" or "backward".
      run: the operation as a function of `arguments`.
      arguments: `jax.ShapeDtypeStruct`s.
    """

    name: str
    phase: str
    run: Callable
    arguments: tuple


def forward_cases(
    tokens: int, *, implementation: str, dtype: str = "bfloat16", width: int = WIDTH
) -> list[Case]:
    """Every forward operation for one video of `tokens` tokens and heads of `width`."""
    blocks = -(-tokens // SPEC.block_size)
    how = {"implementation": implementation, "scale": width**-0.5}

    def floats(length, heads):
        return jax.ShapeDtypeStruct((1, length, heads, width), dtype)

    def ints(*shape):
        return jax.ShapeDtypeStruct((1, *shape), jnp.int32)

    def attend(q, k, v, start, query_pos, key_pos):
        return dense_attention(q, k, v, start=start, query_pos=query_pos, key_pos=key_pos, **how)

    def selected(q, k, v, bits, pos):
        chosen = BlockSet(bits, SPEC.block_size, SPEC.block_count)
        return selected_attention(q, k, v, chosen, pos, **how)

    def dense(queries, keys):
        return floats(queries, HEADS), *_pair(keys), ints(queries), ints(queries), ints(keys)

    def _pair(length):
        return floats(length, KV_HEADS), floats(length, KV_HEADS)

    def frames(q, k, v, interval):
        return interval_attention(
            q, k, v, interval=interval, max_length=FRAME_PATCHES, implementation=implementation
        )

    q, lse = floats(tokens, HEADS), jax.ShapeDtypeStruct((1, tokens, HEADS), jnp.float32)
    bits = jax.ShapeDtypeStruct((1, tokens, KV_HEADS, -(-blocks // 32)), jnp.uint32)
    gates = jax.ShapeDtypeStruct((1, tokens, HEADS, 3), jnp.float32)
    visible, pos = ints(tokens, 2), ints(tokens)
    patches = min(4 * tokens, MOST_PATCHES)
    patch = jax.ShapeDtypeStruct((1, patches, TOWER_HEADS, TOWER_WIDTH), dtype)
    choose = functools.partial(select_blocks, rule=RULE, **how)
    window = functools.partial(window_attention, window=SPEC.window_size, **how)
    nsa = functools.partial(nsa_attention, spec=SPEC, implementation=implementation)
    compress = functools.partial(compressed_attention, **how)
    cases = {
        "compressed_attention": (compress, (q, *_pair(blocks), visible)),
        "select_blocks": (choose, (q, floats(blocks, KV_HEADS), lse, visible, pos)),
        "selected_attention": (selected, (q, *_pair(tokens), bits, pos)),
        "window_attention": (window, (q, *_pair(tokens), pos, pos)),
        "nsa_attention": (nsa, (q, *_pair(tokens), gates)),
        "dense_attention": (attend, dense(TEXT, tokens + TEXT)),
        "decode": (attend, dense(1, tokens + TEXT)),
        "interval_attention": (frames, (patch, patch, patch, ints(patches, 2))),
    }
    return [Case(name, "forward", *case) for name, case in cases.items()]


def backward_cases(
    tokens: int, *, implementation: str, dtype: str = "bfloat16", width: int = WIDTH
) -> list[Case]:
    """The gradients of every operation that training runs, with the forward pass they need."""
    shape = {"implementation": implementation, "dtype": dtype, "width": width}
    return [
        Case(case.name, "backward", gradients(case.run, case.arguments), case.arguments)
        for case in forward_cases(tokens, **shape)
        if case.name in TRAINED
    ]


def gradients(op: Callable, arguments: tuple) -> Callable:
    """-> the gradients of what `op` returns first, for its leading floating arguments."""
    kinds = [jax.tree.leaves(x)[0].dtype for x in arguments]
    floats = sum(jnp.issubdtype(kind, jnp.floating) for kind in kinds)

    def run(*arrays):
        def first(*leading):
            return jax.tree.leaves(op(*leading, *arrays[floats:]))[0]

        out, pull = jax.vjp(first, *arrays[:floats])
        return pull(out)  # any array of this shape would do

    return run
