"""Every supported kernel, dtype and head width has tile sizes; nothing else has."""

import jax.numpy as jnp
import pytest

from pallas_kernels.block_sizes import triton

KERNELS = sorted({kernel for kernel, *_ in triton.DEFAULTS})


@pytest.mark.parametrize("width", triton.HEAD_WIDTHS)
@pytest.mark.parametrize("dtype", triton.DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_sizes_are_powers_of_two(kernel, dtype, width):
    params = triton.pick(kernel, None, dtype, width)
    for size in (params.block_q, params.block_kv, params.num_warps):
        assert size > 0
        assert size & (size - 1) == 0


def test_a_measured_device_has_its_own_sizes(monkeypatch):
    own = triton.TuningConfig(64, 32, num_warps=4, num_stages=4)
    monkeypatch.setitem(triton.MEASURED, ("H200", "block_scores", 2, 128), own)
    assert triton.pick("block_scores", "NVIDIA H200", jnp.bfloat16, 128) == own
    for device, dtype in (
        ("NVIDIA H100", jnp.bfloat16),
        ("NVIDIA H200", jnp.float32),
        (None, "f2"),
    ):
        assert triton.pick("block_scores", device, dtype, 128) != own


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (("no_such_kernel", None, jnp.bfloat16, 128), "no_such_kernel"),
        (("block_scores", None, jnp.bfloat16, 80), "head width 80.*xla"),
        (("block_scores", None, jnp.float64, 128), "float64.*xla"),
    ],
)
def test_what_has_no_kernel_is_an_error(case, message):
    with pytest.raises(ValueError, match=message):
        triton.pick(*case)
