"""The block lists of tiles against loops over queries: order, members, cuts, what is dropped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockSet
from pallas_kernels.block_sparse import kv_lists
from pallas_kernels.block_sparse.block_set import pack

BLOCK = 32


def _choices(shape, density, seed=0):
    return np.random.default_rng(seed).random(shape) < density


def _limits(rows, queries, keys, seed=0):
    """The last key of each query: any, or none."""
    return np.random.default_rng(seed).integers(-1, keys, (rows, queries)).astype(np.int32)


def _build(members, limit, *, queries, keys, most=None):
    blocks = BlockSet(pack(jnp.asarray(members)), BLOCK, most)
    build = jax.jit(functools.partial(kv_lists.build, block_q=queries, keys=keys))
    return jax.tree.map(np.asarray, build(blocks, jnp.asarray(limit)))


def _tile(lists, *at):
    """The used part of one list, and that nothing lies past it."""
    count = lists.count[at]
    assert not lists.ids[at][count:].any()
    assert not lists.members[at][count:].any()
    return lists.ids[at][:count], lists.members[at][:count], lists.num_full[at]


@pytest.mark.parametrize(("queries", "tile"), [(1, 16), (16, 16), (45, 16), (70, 32), (9, 1)])
def test_equals_loops_over_queries(queries, tile):
    heads, count = 2, 70
    keys = count * BLOCK - 5
    members = _choices((2, queries, heads, count), 0.1)
    limit = _limits(2, queries, keys)
    lists = _build(members, limit, queries=tile, keys=keys)
    for row, head, index in np.ndindex(2, heads, -(-queries // tile)):
        part = slice(index * tile, (index + 1) * tile)
        live = limit[row, part] >= 0
        chosen = members[row, part, head] & live[:, None]
        ids, words, num_full = _tile(lists, row, head, index)
        np.testing.assert_array_equal(ids, np.flatnonzero(chosen.any(0)))
        read = (
            words.astype(np.uint32)[None] >> np.arange(len(chosen))[:, None].astype(np.uint32)
        ) & 1
        np.testing.assert_array_equal(read, chosen[:, ids])
        shortest = limit[row, part][live].min(initial=keys - 1) + 1
        assert num_full == ((ids + 1) * BLOCK <= shortest).sum()


def test_a_list_is_as_long_as_its_queries_can_fill_it():
    members = np.zeros((1, 8, 1, 200), bool)
    members[0, np.arange(8), 0, 3 * np.arange(8)] = True
    limit = np.full((1, 8), 6399, np.int32)
    lists = _build(members, limit, queries=4, keys=6400, most=1)
    assert lists.ids.shape == (1, 1, 2, 4)
    np.testing.assert_array_equal(lists.ids[0, 0], [[0, 3, 6, 9], [12, 15, 18, 21]])
    np.testing.assert_array_equal(lists.members[0, 0], [[1, 2, 4, 8]] * 2)


def test_blocks_past_the_keys_are_dropped():
    members = np.ones((1, 1, 1, 96), bool)
    lists = _build(members, np.array([[39]], np.int32), queries=4, keys=40)
    ids, _, num_full = _tile(lists, 0, 0, 0)
    np.testing.assert_array_equal(ids, [0, 1])
    assert num_full == 1


def test_queries_that_see_nothing_choose_nothing():
    members = np.ones((1, 4, 1, 3), bool)
    lists = _build(members, np.array([[-1, -1, 70, -1]], np.int32), queries=2, keys=96)
    np.testing.assert_array_equal(lists.count[0, 0], [0, 3])
    np.testing.assert_array_equal(lists.members[0, 0, 1], [1, 1, 1])
    np.testing.assert_array_equal(lists.num_full[0, 0], [0, 2])
