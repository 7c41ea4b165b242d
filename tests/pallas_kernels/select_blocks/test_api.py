"""The choice of blocks equals `jax.lax.top_k` of the same scores, ties and forced blocks too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import SelectRule, compressed_attention, select_blocks
from pallas_kernels.block_sparse.block_set import pack, unpack


def _chosen(q, k, own, rule, implementation, first=0):
    visible = jnp.stack([jnp.full_like(own, first), own], axis=-1)
    _, lse = compressed_attention(q, k, k, visible, scale=0.3, implementation=implementation)
    blocks = select_blocks(
        q, k, lse, visible, own, rule=rule, scale=0.3, implementation=implementation
    )
    return np.asarray(unpack(blocks.bits, k.shape[1]))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("count", "top"), [(300, 7), (40, 40), (5, 32)])
def test_equals_top_k_with_many_ties(implementation, count, top):
    # Keys of -1, 0 and 1 in one dimension: few distinct scores, so that most choices are ties.
    rng = np.random.default_rng(count)
    k = jnp.asarray(rng.integers(-1, 2, (1, count, 1, 1)), jnp.float32)
    q = jnp.ones((1, 33, 2, 1))
    own = jnp.asarray(rng.integers(0, count, (1, 33)), jnp.int32)
    got = _chosen(q, k, own, SelectRule(top, 0, 1, 64), implementation)[0, :, 0]
    j = np.arange(count)
    for query, last in enumerate(np.asarray(own[0])):
        score = np.where(j == last, 9.0, np.where(j < last, k[0, :, 0, 0], -9.0))
        index = np.asarray(jax.lax.top_k(jnp.asarray(score), min(top, count))[1])
        assert set(np.flatnonzero(got[query])) == {i for i in index if i <= last}


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_forced_blocks_are_clipped_to_the_sequence(implementation):
    q, k = jnp.zeros((1, 4, 1, 4)), jnp.ones((1, 20, 1, 4))
    own = jnp.asarray([[5, 6, 12, -1]], jnp.int32)  # sequence starts at block 5; -1 is padding
    got = _chosen(q, k, own, SelectRule(5, 2, 2, 64), implementation, first=5)[0, :, 0]
    chosen = [set(np.flatnonzero(row)) for row in got]
    assert chosen == [{5}, {5, 6}, {5, 6, 7, 11, 12}, set()]


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_packing_is_reversible(count):
    members = np.random.default_rng(count).random((3, 5, count)) < 0.5
    bits = pack(jnp.asarray(members))
    assert bits.shape == (3, 5, -(-count // 32))
    np.testing.assert_array_equal(unpack(bits, count), members)
