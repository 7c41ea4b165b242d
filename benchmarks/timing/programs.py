"""What the benchmark times: compiled operations with their inputs."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.inputs import (
    BLOCK_COUNT,
    BLOCK_SIZE,
    FRAME_PATCHES,
    HEADS,
    INPUTS,
    KV_HEADS,
    TOWER_HEADS,
    TOWER_WIDTH,
    WIDTH,
    WINDOW_SIZE,
)
from benchmarks.timing.interleaved import calls_per_sample
from pallas_kernels import (
    NSASpec,
    SelectRule,
    block_mean,
    block_sizes,
    compressed_attention,
    dense_attention,
    interval_attention,
    nsa_attention,
    nsa_blocks,
    select_blocks,
    selected_attention,
    window_attention,
)

SPEC = NSASpec(BLOCK_SIZE, BLOCK_COUNT, WINDOW_SIZE)
RULE = SelectRule(SPEC.block_count, SPEC.forced_first, SPEC.forced_local, SPEC.block_size)
DECODE_ROWS = (1, 8)


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled operation and its inputs.

    Attributes:
      name: of the operation.
      phase: "forward" or "forward+backward".
      tokens: queries and keys; in decoding keys only.
      rows: of the batch.
      source: which of `INPUTS`, or "cache".
      run: the executable.
      arrays: its inputs.
      moved: bytes of its inputs and outputs.
      calls: per timing.
      baseline: name of the operation whose time is divided by this one's.
    """

    name: str
    phase: str
    tokens: int
    rows: int
    source: str
    run: Callable
    arrays: tuple
    moved: int
    calls: int = 1
    baseline: str = "dense"

    @property
    def what(self) -> str:
        batch = f" x{self.rows}" if self.rows > 1 else ""
        return f"{self.name}{batch} {self.phase}"

    @property
    def case(self) -> tuple:
        """What a program has in common with its baseline."""
        return self.phase, self.tokens, self.rows, self.source


def inputs(source, tokens, args):
    """q, k, v, gates, dout on the device."""
    return tuple(jnp.asarray(x, args.dtype) for x in INPUTS[source](tokens, seed=args.seed))


def nsa(q, k, v, gates, *, spec=SPEC, implementation="xla"):
    return nsa_attention(q, k, v, gates, spec=spec, implementation=implementation)


def dense(q, k, v, gates, *, implementation="xla"):
    del gates
    pos = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    return dense_attention(
        q, k, v, start=0 * pos, query_pos=pos, key_pos=pos, implementation=implementation
    )


def cudnn(q, k, v, gates):
    del gates
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def forward_backward(op):
    """-> the output and the gradients of all inputs, so that nothing can be left out."""

    def run(*arrays):
        out, vjp = jax.vjp(op, *arrays[:-1])
        return out, vjp(arrays[-1])

    return run


def in_phase(op, phase, arrays):
    """`op` as a function of its inputs in that phase, and these: q, k, v, gates (and dout)."""
    if phase == "forward":
        return op, arrays[:4]
    return forward_backward(op), arrays


PHASES = ("forward", "forward+backward")


def cpu_programs(tokens, phases, args):
    """`xla` sparse attention and `xla` dense attention."""
    arrays = inputs("video", tokens, args)
    for phase in phases:
        for op in (dense, nsa):
            yield _compiled(op.__name__, (phase, tokens, 1, "video"), *in_phase(op, phase, arrays))


def gpu_programs(tokens, phases, args):
    """Triton's sparse attention and its parts, against cuDNN's dense attention; decoding."""
    ops = {
        "dense": cudnn,
        "dense triton": functools.partial(dense, implementation="triton"),
        "nsa": functools.partial(nsa, implementation="triton"),
    }
    for source in INPUTS:
        arrays = inputs(source, tokens, args)
        for phase in phases:
            for name, op in ops.items():
                case = phase, tokens, 1, source
                yield _queued(_compiled(name, case, *in_phase(op, phase, arrays)))
        for name, (op, given) in stages(arrays).items():
            yield _queued(_compiled(name, ("forward", tokens, 1, source), op, given))
    for rows in DECODE_ROWS:
        for name, (op, given) in decoding(tokens, rows, args.dtype).items():
            program = _compiled(name, ("forward", tokens, rows, "cache"), op, given)
            yield dataclasses.replace(_queued(program), baseline="decode cudnn")


def _compiled(name, case, op, arrays):
    size = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves((arrays, jax.eval_shape(op, *arrays)))
    )
    return Program(name, *case, jax.jit(op).lower(*arrays).compile(), arrays, size)


def _queued(program):
    """Enough calls per timing to hide what it costs to start one."""
    return dataclasses.replace(program, calls=calls_per_sample(program.run, program.arrays))


def stages(arrays, implementation="triton"):
    """{name: (operation, inputs)} of the parts of sparse attention, each fed by the one before."""
    q, k, v = arrays[:3]
    scaled = {"scale": WIDTH**-0.5, "implementation": implementation}
    pos = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    visible = jnp.stack([0 * pos, (pos + 1) // SPEC.block_size], axis=-1)

    def mean(k, v):
        return tuple(block_mean(x, block=SPEC.block_size) for x in (k, v))

    compress = functools.partial(compressed_attention, **scaled)
    choose = functools.partial(select_blocks, rule=RULE, **scaled)
    means = jax.jit(mean)(k, v)
    lse = jax.jit(compress)(q, *means, visible)[1]
    scores = q, means[0], lse, visible, pos // SPEC.block_size
    window = functools.partial(window_attention, window=SPEC.window_size, **scaled)
    return {
        "block_mean": (mean, (k, v)),
        "compressed_attention": (compress, (q, *means, visible)),
        "select_blocks": (choose, scores),
        "selected_attention": (
            functools.partial(selected_attention, **scaled),
            (q, k, v, jax.jit(choose)(*scores), pos),
        ),
        "window_attention": (window, (q, k, v, 0 * pos, pos)),
    }


def decoding(tokens, rows, dtype, implementation="triton"):
    """{name: (operation, inputs)} of one new token per row against a cache of `tokens` keys."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (rows, 1, HEADS, WIDTH), dtype)
    k, v = (jax.random.normal(key, (rows, tokens, KV_HEADS, WIDTH), dtype) for key in keys[1:])
    key_pos = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (rows, tokens))
    start, pos = jnp.zeros((rows, 1), jnp.int32), jnp.full((rows, 1), tokens - 1, jnp.int32)

    def ours(q, k, v, start, query_pos, key_pos):
        places = {"start": start, "query_pos": query_pos, "key_pos": key_pos}
        return dense_attention(q, k, v, **places, implementation=implementation)

    def theirs(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    return {
        "decode cudnn": (theirs, (q, k, v)),
        "decode": (ours, (q, k, v, start, pos, key_pos)),
    }


def vision_frames(tokens, dtype, implementation="triton"):
    """(operation, inputs): the vision tower's attention inside the frames of `tokens` tokens."""
    patches = 4 * tokens
    keys = jax.random.split(jax.random.key(0), 3)
    shape = 1, patches, TOWER_HEADS, TOWER_WIDTH
    q, k, v = (jax.random.normal(key, shape, dtype) for key in keys)
    begin = jnp.arange(patches, dtype=jnp.int32)[None] // FRAME_PATCHES * FRAME_PATCHES
    interval = jnp.stack([begin, jnp.minimum(begin + FRAME_PATCHES, patches)], axis=-1)

    def frames(q, k, v, interval):
        return interval_attention(
            q, k, v, interval=interval, max_length=FRAME_PATCHES, implementation=implementation
        )

    return frames, (q, k, v, interval)


def queries_per_tile(arrays, implementation):
    """Queries that share one union of blocks in the selected branch."""
    q, group = arrays[0], HEADS // KV_HEADS
    if implementation == "xla":
        return min(block_sizes.xla.SELECTED.queries(group), q.shape[1])
    device = jax.devices()[0].device_kind
    rows = block_sizes.triton.pick("selected_attention", device, q.dtype, WIDTH).block_q
    return rows // (1 << (group - 1).bit_length())


def chosen_blocks(arrays, implementation):
    """The `BlockSet` of sparse attention."""
    q, k = arrays[:2]
    return jax.jit(functools.partial(nsa_blocks, spec=SPEC, implementation=implementation))(q, k)
