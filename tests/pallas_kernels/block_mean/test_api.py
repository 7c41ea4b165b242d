"""Means of blocks, in float32 whatever the dtype, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_mean


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_means_in_float64(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 3, 5)), dtype)
    got = block_mean(x, block=4)
    want = np.asarray(x).astype(np.float64).reshape(2, 3, 4, 3, 5).mean(2)
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got).astype(np.float64), want, rtol=2**-7, atol=1e-6)


def test_a_sum_that_bfloat16_would_lose_is_kept():
    x = jnp.full((1, 4096, 1, 1), 1, jnp.bfloat16)  # 256 + 1 is 256 in bfloat16
    assert block_mean(x, block=4096)[0, 0, 0, 0] == 1


def test_a_ragged_length_is_rejected():
    with pytest.raises(ValueError, match="x has 10 tokens, not a multiple of block=4"):
        block_mean(jnp.zeros((1, 10, 1, 1)), block=4)
