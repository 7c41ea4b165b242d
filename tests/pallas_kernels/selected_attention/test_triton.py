"""The GPU kernel of the selected branch: any choice of blocks, and the fused sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockSet, selected_attention
from pallas_kernels.block_sparse.block_set import ChosenKeys, pack
from pallas_kernels.flash_attention.params import KernelConfig
from pallas_kernels.selected_attention import triton
from tests import testing
from tests.pallas_kernels.chosen_blocks import causal, choice, inputs, loops, visible
from tests.pallas_kernels.devices import INTERPRET, kernels

pytestmark = pytest.mark.gpu
KERNELS = kernels("triton")


def _qkv(queries, keys, heads, kv_heads, **sizes):
    return inputs(queries, keys, heads, kv_heads, **sizes)[:3]


def _loops(arrays, seen):
    return loops((*arrays, arrays[0]), seen)[0]


def _run(arrays, members, pos, block, **settings):
    blocks = BlockSet(pack(jnp.asarray(members)), block)
    op = functools.partial(selected_attention, scale=arrays[0].shape[3] ** -0.5)
    return jax.jit(functools.partial(op, **settings))(*arrays, blocks, jnp.asarray(pos))


def _gated(arrays, seen, dtype="float32"):
    """Gates and two branches; NaN for the queries that see nothing."""
    rng = np.random.default_rng(9)
    shapes = (*arrays[0].shape[:3], 3), arrays[0].shape, arrays[0].shape
    padding = (~seen.any((2, 3)))[..., None, None]
    return tuple(
        jnp.where(padding, jnp.nan, jnp.asarray(rng.standard_normal(x), dtype)) for x in shapes
    )


def _gated_sum(gated, selected):
    gates, compressed, window = (np.nan_to_num(np.asarray(x).astype(np.float64)) for x in gated)
    branches = compressed, np.asarray(selected, np.float64), window
    return sum(gates[..., i, None] * x for i, x in enumerate(branches))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fused_sum_equals_the_sum_of_branches(dtype):
    arrays = _qkv(70, 200, 14, 2, rows=2, dtype=dtype)
    pos = causal(70, 200, rows=2)
    members = choice(pos, 2, 200, 32)
    members[..., 0] = True
    seen = visible(members, pos, 200, 32)
    gated = _gated(arrays, seen, dtype)
    sees = ChosenKeys(BlockSet(pack(jnp.asarray(members)), 32), jnp.asarray(pos))
    config = KernelConfig("selected_attention", 64**-0.5, interpret=INTERPRET)
    got, _ = jax.jit(functools.partial(triton.forward, config=config))(*arrays, sees, gated=gated)
    testing.assert_close("out", got, _gated_sum(gated, _loops(arrays, seen)), dtype=dtype)
    assert not np.asarray(got)[pos < 0].any()


def test_a_block_size_without_a_kernel_is_named():
    arrays, pos = _qkv(4, 32, 2, 1), causal(4, 32)
    with pytest.raises(ValueError, match=r"block size 16 .* use one of \(32, 64\) or .*'xla'"):
        _run(arrays, np.ones((1, 4, 1, 2), bool), pos, 16, **KERNELS)
