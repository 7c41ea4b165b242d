"""The lists of queries against loops over blocks: order, segments, what is dropped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockSet
from pallas_kernels.block_sparse import query_lists
from pallas_kernels.block_sparse.block_set import pack
from tests.pallas_kernels.devices import INTERPRET

pytestmark = pytest.mark.gpu
BLOCK = 32


def _build(members, limit, *, keys, segment, most=None):
    blocks = BlockSet(pack(jnp.asarray(members)), BLOCK, most)
    build = functools.partial(query_lists.build, keys=keys, segment=segment, interpret=INTERPRET)
    return jax.tree.map(np.asarray, jax.jit(build)(blocks, jnp.asarray(limit)))


def _list(lists, segment, *at):
    """The queries of block `at`; checks that its segments are full but for the last."""
    row, head, block = at
    first, last = lists.first[row, head, block : block + 2]
    segments = []
    for z in range(first, last):
        assert lists.block[row, head, z] == block
        segments.append(
            lists.queries[row, head, lists.begin[row, head, z] : lists.end[row, head, z]]
        )
    assert all(len(x) == segment for x in segments[:-1])
    assert all(0 < len(x) <= segment for x in segments[-1:])
    return np.concatenate([*segments, np.zeros(0, np.int32)])


@pytest.mark.parametrize(
    ("queries", "count", "segment"), [(70, 70, 8), (600, 5, 128), (1, 1, 4), (513, 33, 700)]
)
def test_equals_loops_over_blocks(queries, count, segment):
    keys = count * BLOCK - 5
    rng = np.random.default_rng(queries)
    members = rng.random((2, queries, 2, count)) < 0.3
    members[:, :, :, 0] = True  # a heavy block
    limit = rng.integers(-1, keys, (2, queries)).astype(np.int32)
    lists = _build(members, limit, keys=keys, segment=segment)
    for row, head, block in np.ndindex(2, 2, count):
        want = np.flatnonzero(members[row, :, head, block] & (limit[row] >= block * BLOCK))
        np.testing.assert_array_equal(_list(lists, segment, row, head, block), want)
    unused = np.arange(lists.block.shape[2]) >= lists.first[..., -1:]
    np.testing.assert_array_equal((lists.begin == lists.end), unused)


def test_room_follows_the_choices_of_a_query():
    members = np.zeros((1, 64, 1, 100), bool)
    members[0, np.arange(64), 0, np.arange(64)] = True
    members[0, :, 0, 0] = True
    lists = _build(members, np.full((1, 64), 3199, np.int32), keys=3200, segment=8, most=2)
    assert lists.queries.shape == (1, 1, 64 * 2 + 1)
    assert lists.block.shape == (1, 1, 100 + 64 * 2 // 8)
    np.testing.assert_array_equal(_list(lists, 8, 0, 0, 0), np.arange(64))
    np.testing.assert_array_equal(_list(lists, 8, 0, 0, 5), [5])


def test_nobody_chooses_anything():
    lists = _build(np.zeros((1, 9, 1, 3), bool), np.full((1, 9), 95, np.int32), keys=96, segment=4)
    assert not lists.first.any()
    np.testing.assert_array_equal(lists.begin, lists.end)


def test_blocks_past_the_keys_are_dropped():
    members = np.ones((1, 1, 1, 96), bool)
    lists = _build(members, np.array([[39]], np.int32), keys=40, segment=4)
    np.testing.assert_array_equal(lists.first[0, 0], [0, 1, 2])
