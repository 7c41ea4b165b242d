"""How the Triton kernels cut their work, per kernel, element size, head width and device.

Results depend on these sizes by rounding only. `DEFAULTS` holds what compiles for Hopper without
spilling registers (`make compile-check TARGET=h100`); `MEASURED` holds what was fastest on a device
(`benchmarks/tune.py` prints its lines). Nothing is tuned while a program runs.
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

HEAD_WIDTHS = (64, 128)
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """The sizes of one kernel.

    Attributes:
      block_q: rows of a program's tile: queries of one head; in `selected_attention*` queries times
        the padded heads of a group; in `decode_attention` queries times heads, at most; in
        `top_blocks` score rows.
      block_kv: keys, or block means, per step. In `selected_attention*` the block size takes its
        place; in `top_blocks` rows of more or fewer blocks make a program of fewer or more rows.
      num_warps: warps of 32 threads per program.
      num_stages: loads in flight of a loop over keys.
    """

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int


_HALF = {  # bfloat16 and float16: head width -> kernel -> sizes
    128: {
        "dense_attention": TuningConfig(128, 64, num_warps=8, num_stages=3),
        "compressed_attention": TuningConfig(128, 64, num_warps=8, num_stages=3),
        "window_attention": TuningConfig(128, 64, num_warps=8, num_stages=3),
        "interval_attention": TuningConfig(64, 64, num_warps=4, num_stages=2),
        "attention_dq": TuningConfig(128, 64, num_warps=8, num_stages=2),
        "attention_dkv": TuningConfig(32, 128, num_warps=8, num_stages=2),
        "decode_attention": TuningConfig(64, 64, num_warps=4, num_stages=3),
        "block_scores": TuningConfig(128, 64, num_warps=8, num_stages=2),
        "top_blocks": TuningConfig(4, 2048, num_warps=4, num_stages=1),
        "selected_attention": TuningConfig(128, 64, num_warps=8, num_stages=2),
        "selected_attention_dq": TuningConfig(128, 64, num_warps=8, num_stages=2),
        "selected_attention_dkv": TuningConfig(64, 64, num_warps=8, num_stages=2),
    },
}
_HALF[64] = _HALF[128] | {
    "dense_attention": TuningConfig(128, 64, num_warps=4, num_stages=3),
    "compressed_attention": TuningConfig(128, 64, num_warps=4, num_stages=3),
    "window_attention": TuningConfig(128, 64, num_warps=4, num_stages=3),
    "attention_dq": TuningConfig(128, 64, num_warps=4, num_stages=2),
    "attention_dkv": TuningConfig(64, 128, num_warps=8, num_stages=2),
}
# True float32 products run on the ordinary units, whose operands all sit in registers.
_FLOAT32 = {
    128: {
        "dense_attention": TuningConfig(16, 64, num_warps=8, num_stages=2),
        "compressed_attention": TuningConfig(32, 64, num_warps=16, num_stages=2),
        "window_attention": TuningConfig(32, 64, num_warps=16, num_stages=2),
        "interval_attention": TuningConfig(32, 64, num_warps=16, num_stages=2),
        "attention_dq": TuningConfig(32, 32, num_warps=16, num_stages=2),
        "attention_dkv": TuningConfig(32, 32, num_warps=16, num_stages=2),
        "decode_attention": TuningConfig(16, 32, num_warps=8, num_stages=2),
        "block_scores": TuningConfig(32, 64, num_warps=8, num_stages=2),
        "top_blocks": TuningConfig(4, 2048, num_warps=4, num_stages=1),
        "selected_attention": TuningConfig(16, 64, num_warps=8, num_stages=2),
        "selected_attention_dq": TuningConfig(16, 64, num_warps=8, num_stages=2),
        "selected_attention_dkv": TuningConfig(16, 64, num_warps=8, num_stages=2),
    },
}
_FLOAT32[64] = _FLOAT32[128] | {
    "attention_dq": TuningConfig(32, 32, num_warps=8, num_stages=2),
    "attention_dkv": TuningConfig(32, 32, num_warps=8, num_stages=2),
    "selected_attention": TuningConfig(32, 64, num_warps=8, num_stages=2),
    "selected_attention_dq": TuningConfig(32, 64, num_warps=8, num_stages=2),
    "selected_attention_dkv": TuningConfig(32, 64, num_warps=8, num_stages=2),
}

# (kernel, bytes per element, head width) -> sizes
DEFAULTS: dict[tuple[str, int, int], TuningConfig] = {
    (kernel, size, width): params
    for size, widths in ((2, _HALF), (4, _FLOAT32))
    for width, kernels in widths.items()
    for kernel, params in kernels.items()
}

# (device, kernel, bytes per element, head width) -> sizes; the device is a part of its JAX name.
MEASURED: dict[tuple[str, str, int, int], TuningConfig] = {}


def pick(kernel: str, device_kind: str | None, dtype: DTypeLike, head_width: int) -> TuningConfig:
    """The sizes for `kernel` on a device.

    Args:
      kernel: a name in `DEFAULTS`.
      device_kind: `jax.Device.device_kind`, such as "NVIDIA H100 80GB HBM3"; None without a device.
      dtype: of queries, keys and values.
      head_width: values per head.

    Raises:
      ValueError: there is no such kernel, or it takes no such dtype or head width.
    """
    kernels = sorted({name for name, *_ in DEFAULTS})
    if kernel not in kernels:
        raise ValueError(f"{kernel=} has no tile sizes; kernels are {kernels}")
    if jnp.dtype(dtype).name not in DTYPES:
        raise ValueError(
            f"dtype {jnp.dtype(dtype).name} has no Triton kernel; use one of {DTYPES} or "
            "implementation='xla'"
        )
    if head_width not in HEAD_WIDTHS:
        raise ValueError(
            f"head width {head_width} has no Triton kernel; use one of {HEAD_WIDTHS} or "
            "implementation='xla'"
        )
    case = kernel, jnp.dtype(dtype).itemsize, head_width
    for (device, *measured), params in MEASURED.items():
        if device_kind is not None and device in device_kind and tuple(measured) == case:
            return params
    return DEFAULTS[case]
