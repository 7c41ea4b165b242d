"""How the kernels cut their work on each device, and what they take."""

from pallas_kernels.block_sizes import supported, tpu, tpu_vmem, triton, xla

__all__ = ["supported", "tpu", "tpu_vmem", "triton", "xla"]
