"""The devices that programs are compiled for, and how to read what their kernels use."""

import dataclasses
import tempfile
import time
import types
from collections.abc import Callable

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from benchmarks.aot import hopper, tpu
from benchmarks.aot.report import Compiled, KernelUse
from videonsa_jax.aot.compile import aot_compile, memory
from videonsa_jax.aot.topology import Topology, parse_topology


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
      implementation: its kernels' name in `pallas_kernels`.
      topology: operations are compiled for its first device.
      tokens: lengths at which operations are compiled.
      reader: `hopper` or `tpu`, says what kernels use and what they may.
    """

    implementation: str
    topology: Topology
    tokens: tuple[int, ...]
    reader: types.ModuleType

    def problems(self, use: KernelUse, dtype: str) -> list[str]:
        """Which limits a kernel breaks."""
        return self.reader.problems(use, dtype, self.topology.chip.kind)

    def compile_operation(self, run: Callable, arguments: tuple) -> Compiled:
        """Compiles for one device.

        Args:
          run: a function of arrays.
          arguments: of `run`, with a `jax.ShapeDtypeStruct` for each array.

        Raises:
          ToolchainMissing: this machine lacks what compiling needs.
          CompilationError: the compiler refused the program.
        """
        one = SingleDeviceSharding(self.topology.devices()[0])
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), arguments
        )
        return self.compile_program(lambda: jax.jit(run).lower(*arguments))

    def compile_program(
        self, lower: Callable[[], jax.stages.Lowered], mesh: Mesh | None = None
    ) -> Compiled:
        """Compiles what `lower` returns under `mesh`, if any; raises likewise."""
        begin = time.perf_counter()
        with (
            jax.sharding.use_abstract_mesh(self.topology.tracing(mesh)),
            tempfile.TemporaryDirectory() as dump,
        ):
            lowered = lower()
            options = self.topology.compiler_options | self.reader.options(dump)
            compiled = aot_compile(lowered, options)
            seconds = time.perf_counter() - begin
            kernels, versions = self.reader.kernels(lowered, compiled, dump)
        return Compiled(kernels, memory(compiled), seconds, versions, compiled.as_text())


def _tpu(name):
    return Target("mosaic_tpu", parse_topology(name), (8192, 32_768, 131_072), tpu)


TARGETS = {
    "h100": Target("triton", parse_topology("h100:1"), (32_768, 131_072), hopper),
    "v5e": _tpu("v5e:2x2"),
    "v5p": _tpu("v5p:2x2x1"),
    "v6e": _tpu("v6e:2x2"),
}
