"""The only door to Pallas: what differs between versions of JAX ends here.

Kernels import `pl`, `plgpu` and `pltpu` from this module and start with `triton_call` or
`mosaic_call`; `splash` and `splash_mask` are JAX's own dense attention for TPUs.
"""

import warnings

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as splash_mask,
)

__all__ = [
    "device_kind",
    "mosaic_call",
    "pl",
    "platform",
    "plgpu",
    "pltpu",
    "splash",
    "splash_mask",
    "triton_call",
]

# JAX 0.11 and later say so when a kernel is lowered, with none of our frames on the stack: a filter
# around the call would not catch it.
_DEPRECATION = "The Pallas Triton backend is deprecated and will be removed in a future JAX"


def triton_call(
    kernel,
    *,
    grid,
    out_shape,
    num_warps,
    num_stages,
    interpret,
    name,
    in_specs=None,
    out_specs=None,
):
    """A `pl.pallas_call` of the Triton backend; its kernel bears `name` in HLO, PTX and profiles.

    Args:
      kernel: takes one ref per input and output.
      grid: programs per axis, at most three axes; the first varies fastest.
      out_shape: a `jax.ShapeDtypeStruct` per output.
      num_warps: warps per program.
      num_stages: loads in flight of a loop.
      interpret: run on any platform, in the interpreter.
      name: of the kernel.
      in_specs: a `pl.BlockSpec` per input; None: each ref is the whole array.
      out_specs: likewise for the outputs.

    Returns:
      A function of the inputs.
    """
    if not interpret:
        warnings.filterwarnings("ignore", message=_DEPRECATION, category=DeprecationWarning)

    def body(*refs):
        kernel(*refs)

    body.__name__ = body.__qualname__ = name  # the lowering reads the name from the function
    specs = {"in_specs": in_specs, "out_specs": out_specs}
    return pl.pallas_call(
        body,
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
        **{key: value for key, value in specs.items() if value is not None},
    )


def mosaic_call(
    kernel,
    *,
    grid,
    in_specs,
    out_specs,
    out_shape,
    dimension_semantics,
    vmem_limit_bytes,
    interpret,
    name,
    scratch_shapes=(),
):
    """A `pl.pallas_call` of the Mosaic backend for TPUs; its kernel bears `name` in HLO.

    Under `pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(...))` the kernel runs in the
    interpreter that models the memories and semaphores of a TPU and can detect races.

    Args:
      kernel: takes one ref per input, output and scratch.
      grid: steps per axis; the last varies fastest.
      in_specs: a `pl.BlockSpec` per input.
      out_specs: a `pl.BlockSpec` per output.
      out_shape: a `jax.ShapeDtypeStruct` per output.
      dimension_semantics: per axis "parallel", which the cores of a chip may share, or "arbitrary",
        which runs in order.
      vmem_limit_bytes: the most that the kernel may take of a core's vector memory.
      interpret: run on any platform, in the interpreter.
      name: of the kernel.
      scratch_shapes: memory that keeps its content from step to step.

    Returns:
      A function of the inputs.
    """
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch_shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=dimension_semantics, vmem_limit_bytes=vmem_limit_bytes
        ),
        interpret=interpret,
        name=name,
    )


def platform() -> str:
    """ "cpu", "gpu" or "tpu": where code that is traced now will run.

    It is the platform of the mesh in use, also of an abstract one (`jax.sharding.use_abstract_mesh`
    with an `AbstractDevice`, for compiling without the device), or that of the default device.
    """
    name = _device().platform
    return "gpu" if name in ("cuda", "rocm") else name


def device_kind() -> str:
    """The model of that device, such as "NVIDIA H100 80GB HBM3"."""
    return _device().device_kind


def _device():
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
    if device is None or isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device
