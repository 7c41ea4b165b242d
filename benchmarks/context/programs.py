"""The sparse attention of a video that devices share, compiled and not run."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.inputs import BLOCK_COUNT, BLOCK_SIZE, HEADS, KV_HEADS, WIDTH, WINDOW_SIZE
from pallas_kernels import (
    MeshAxis,
    NSASpec,
    SelectedReader,
    combine,
    nsa_shard_branches,
    sharded_attention,
)
from videonsa_jax.aot.compile import aot_compile, memory
from videonsa_jax.aot.topology import Topology

FAST_COMPILE = {"xla_backend_optimization_level": 0}
VIDEONSA = NSASpec(BLOCK_SIZE, BLOCK_COUNT, WINDOW_SIZE)
_HEADS = PartitionSpec(None, "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """One row of a video, and its attention."""

    heads: int = HEADS
    kv_heads: int = KV_HEADS
    width: int = WIDTH
    spec: NSASpec = VIDEONSA


@dataclasses.dataclass(frozen=True)
class Case:
    """Devices and what they hold.

    Attributes:
      mode: as in `sharded_attention`.
      context: devices that share the tokens.
      tokens: of one device.
      tensor: devices that share the heads.
      dtype: of queries, keys and values.
      geometry: of the whole.
    """

    mode: Literal["gather", "ring"]
    context: int
    tokens: int
    tensor: int = 1
    dtype: str = "float32"
    geometry: Geometry = Geometry()

    def mesh(self, devices: list[jax.Device]) -> Mesh:
        """Raises ValueError if there are too few devices."""
        shape = self.context, self.tensor
        if math.prod(shape) > len(devices):
            raise ValueError(
                f"context={self.context} x tensor={self.tensor} is more than the {len(devices)} "
                f"devices here; set JAX_NUM_CPU_DEVICES={math.prod(shape)}"
            )
        devices = np.array(devices[: math.prod(shape)]).reshape(shape)
        return Mesh(devices, ("context", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def arrays(self, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
        """Segment ids, q, k, v, gates."""
        g, length = self.geometry, self.context * self.tokens
        sizes = ((g.heads, g.width), (g.kv_heads, g.width), (g.kv_heads, g.width), (g.heads, 3))
        heads, whole = NamedSharding(mesh, _HEADS), NamedSharding(mesh, PartitionSpec())
        return [
            jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=whole),
            *(jax.ShapeDtypeStruct((1, length, *x), self.dtype, sharding=heads) for x in sizes),
        ]


def attention(case: Case, mesh: Mesh):
    """float[1 t n h] as a function of what `Case.arrays` names; for use under `jax.jit`."""
    axis = MeshAxis("context", case.context)

    def part(segment_ids, q, k, v, gates):
        sparse = nsa_shard_branches(
            q, k, v, spec=case.geometry.spec, axis=axis, segment_ids=segment_ids
        )
        (selected,) = sharded_attention(
            (q,),
            ((k, v),),
            (SelectedReader(sparse.blocks, sparse.pos),),
            axis=axis,
            scale=q.shape[-1] ** -0.5,
            mode=case.mode,
        )
        return combine(gates, (sparse.compressed, selected, sparse.window), sparse.pos)

    specs = PartitionSpec(), *(_HEADS,) * 4
    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=_HEADS, check_vma=False)


def compile_apart(case: Case, mesh: Mesh) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """The forward pass, and the backward pass of what the forward pass keeps for it."""
    run = attention(case, mesh)

    def forward(segment_ids, *arrays):
        return jax.vjp(lambda *x: run(segment_ids, *x), *arrays)

    lowered = jax.jit(forward).lower(*case.arrays(mesh))
    compiled = lowered.compile(FAST_COMPILE)
    dout, kept = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )
    backward = jax.jit(lambda kept, dout: kept(dout))
    return compiled, backward.lower(kept, dout).compile(FAST_COMPILE)


def temporary_bytes(case: Case, topology: Topology) -> dict[str, int]:
    """Of one device, as its compiler plans them: a forward pass, and one with its backward pass.

    Raises:
      ToolchainMissing: this Python, or this machine, cannot compile for these devices.
      CompilationError: the compiler refused a program.
    """
    mesh = case.mesh(topology.devices())
    arrays = case.arrays(mesh)

    def both(dout, segment_ids, *arrays):
        out, backward = jax.vjp(lambda *x: run(segment_ids, *x), *arrays)
        return out, backward(dout)

    sizes = {}
    with jax.sharding.use_abstract_mesh(topology.tracing(mesh)):
        run = attention(case, None)
        for name, step, given in (
            ("forward", run, arrays),
            ("forward+backward", both, [arrays[1], *arrays]),
        ):
            compiled = aot_compile(jax.jit(step).lower(*given), topology.compiler_options)
            sizes[name] = memory(compiled).temporaries
    return sizes
