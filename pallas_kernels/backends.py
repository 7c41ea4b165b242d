"""What attention runs on: one `Backend` per kind of kernel, in the order in which None takes them.

To add one, from anywhere: `BACKENDS.insert(0, Backend(...))`.
"""

import dataclasses
from collections.abc import Callable

import jax

from pallas_kernels.block_sizes import supported
from pallas_kernels.block_sizes.supported import Call
from pallas_kernels.block_sparse.block_set import BlockSet
from pallas_kernels.dense_attention import mosaic_tpu as dense_mosaic_tpu
from pallas_kernels.flash_attention import mosaic_tpu, triton, xla
from pallas_kernels.flash_attention.attention_kernels import AttentionKernels
from pallas_kernels.nsa_attention import triton as nsa_triton
from pallas_kernels.select_blocks import mosaic_tpu as select_mosaic_tpu
from pallas_kernels.select_blocks import triton as select_triton
from pallas_kernels.select_blocks import xla as select_xla
from pallas_kernels.selected_attention import mosaic_tpu as selected_mosaic_tpu
from pallas_kernels.selected_attention import triton as selected_triton
from pallas_kernels.selected_attention import xla as selected_xla


@dataclasses.dataclass(frozen=True)
class Backend:
    """Kernels of one kind.

    Attributes:
      name: what `implementation` calls them.
      platform: where they run without the interpreter, as in `compat.platform`; None: anywhere.
      flash: attention under a `KeyRangeMask`: compressed, window, interval and dense attention.
      selected: attention over `ChosenKeys`.
      select: (q, k, lse, visible, own, rule, config) -> the `BlockSet` of `select_blocks`.
      unsupported_reason: (call, backward=) -> why a `Call` cannot run, or, if `backward`, it or its
        gradients cannot; None if they can.
      dense: (q, k, v, mask, config) -> the result of dense attention; None: `flash` does it.
      fused_nsa: (q, k, v, means, gates, compressed, masks, configs) -> the result of
        `nsa_attention`, see `nsa_attention/triton.py`; None: its branches run one by one.
    """

    name: str
    platform: str | None
    flash: AttentionKernels
    selected: AttentionKernels
    select: Callable[..., BlockSet]
    unsupported_reason: Callable[..., str | None]
    dense: Callable[..., jax.Array] | None = None
    fused_nsa: Callable[..., jax.Array] | None = None

    def supports(self, call: Call) -> bool:
        """Whether a call and its gradients can run."""
        return self.unsupported_reason(call, backward=True) is None

    def attend_dense(self, q, k, v, mask, config) -> jax.Array:
        """Dense attention, by the kernel that is there for it."""
        if self.dense is not None:
            return self.dense(q, k, v, mask, config)
        return self.flash.attend(q, k, v, mask, config)[0]


BACKENDS = [
    Backend(
        "triton",
        "gpu",
        flash=triton.KERNELS,
        selected=selected_triton.KERNELS,
        select=select_triton.select_blocks,
        unsupported_reason=supported.by_triton,
        fused_nsa=nsa_triton.gated_attention,
    ),
    Backend(
        "mosaic_tpu",
        "tpu",
        flash=mosaic_tpu.KERNELS,
        selected=selected_mosaic_tpu.KERNELS,
        select=select_mosaic_tpu.select_blocks,
        unsupported_reason=supported.by_mosaic_tpu,
        dense=dense_mosaic_tpu.attend,
    ),
    Backend(
        "xla",
        None,
        flash=xla.KERNELS,
        selected=selected_xla.KERNELS,
        select=select_xla.select_blocks,
        unsupported_reason=supported.by_xla,
    ),
]
