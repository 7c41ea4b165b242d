"""The GPU kernels that select blocks, interpreted: `jax.lax.top_k`'s sets, in bounded memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import SelectRule, compressed_attention, select_blocks
from pallas_kernels.block_sizes import triton as block_sizes
from pallas_kernels.block_sparse.block_set import unpack
from pallas_kernels.flash_attention.params import KernelConfig
from pallas_kernels.select_blocks import triton
from tests import testing
from tests.pallas_kernels.devices import INTERPRET, kernels

SIZES = block_sizes.pick("top_blocks", None, jnp.float32, 64)
pytestmark = pytest.mark.gpu
QUERIES = 32
SCORES = {
    "distinct": lambda rng, shape: rng.random(shape),
    "few values": lambda rng, shape: rng.integers(0, 4, shape) / 4,
    "all equal": lambda rng, shape: np.full(shape, 0.25),
    "all zero": lambda rng, shape: np.zeros(shape),
    "tiny": lambda rng, shape: rng.integers(0, 9, shape) * 1e-38,
    "sums of 16 heads": lambda rng, shape: 16 * rng.random(shape) ** 9,
}


def _places(rng, count):
    """Queries of sequences that start anywhere, one without any; `own` may have no score."""
    own = rng.integers(0, count, QUERIES)
    own[:3] = -1, 0, count - 1
    first = rng.integers(0, count, QUERIES) % np.maximum(own, 1)
    last = np.where(own < 0, 0, own + rng.integers(0, 2, QUERIES))
    return np.stack([first, last], -1).astype(np.int32), own.astype(np.int32)


def _top_k(scores, visible, own, rule):
    """bool[k m columns]: the set by `jax.lax.top_k`."""
    j = np.arange(scores.shape[-1])
    first, last = visible[:, :1], visible[:, 1:]
    candidate = (first <= j) & (j <= own[:, None])
    forced = candidate & (
        (j < first + rule.num_init_blocks) | (j > own[:, None] - rule.num_local_blocks)
    )
    keys = np.where((first <= j) & (j < last), scores, 0)
    keys = np.where(candidate, np.where(forced, np.inf, keys), -1).astype(np.float32)
    _, index = jax.lax.top_k(jnp.asarray(keys), min(rule.top_k, len(j)))
    chosen = np.zeros(keys.shape, bool)
    np.put_along_axis(chosen, np.asarray(index), True, -1)
    return chosen & candidate


@pytest.mark.parametrize(
    ("columns", "count", "rule"),
    [
        (64, 50, SelectRule(7, 0, 0, 64)),
        (64, 20, SelectRule(32, 2, 2, 64)),
        (2048, 1500, SelectRule(32, 1, 2, 64)),
        (1024, 900, SelectRule(3, 1, 2, 64)),
    ],
)
def test_given_scores_choose_what_top_k_does(columns, count, rule):
    rng = np.random.default_rng(columns)
    kinds = [make(rng, (QUERIES, columns)) for make in SCORES.values()]  # one as each KV head's
    scores = np.stack(kinds).astype(np.float32)
    visible, own = _places(rng, count)
    j = np.arange(columns)
    seen = (visible[:, :1] <= j) & (j < visible[:, 1:])
    config = KernelConfig("select_blocks", 1.0, interpret=INTERPRET)
    run = functools.partial(triton.top_blocks, rule=rule, sizes=SIZES, config=config)
    bits = jax.jit(run)(np.where(seen, scores, np.nan), visible, own)
    chosen = np.asarray(unpack(bits, columns)).swapaxes(0, 1)
    for kind, got, want in zip(SCORES, chosen, _top_k(scores, visible, own, rule), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=kind)


def _inputs(queries, heads, kv_heads, *, block, width=64, rows=1, offset=0, dtype="float32"):
    """q, k, lse, visible, own of causal queries, of which one is padding."""
    rng = np.random.default_rng(queries + heads)
    count = -(-(queries + offset) // block)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q, k = normal(rows, queries, heads, width), normal(rows, count, kv_heads, width)
    pos = np.broadcast_to(np.arange(queries) + offset, (rows, queries)).copy()
    pos[:, queries // 2] = -1
    visible = jnp.asarray(np.stack([0 * pos, (pos + 1) // block], -1), jnp.int32)
    lse = compressed_attention(q, k, k, visible, scale=width**-0.5, implementation="reference")[1]
    return q, k, lse, visible, jnp.asarray(pos // block, jnp.int32)


def _assert_equal_to_reference(arrays, rule):
    run = functools.partial(select_blocks, rule=rule, scale=arrays[0].shape[-1] ** -0.5)
    want = jax.jit(functools.partial(run, implementation="reference"))(*arrays)
    got = jax.jit(functools.partial(run, **kernels("triton")))(*arrays)
    assert got.most == rule.top_k
    np.testing.assert_array_equal(got.bits, want.bits)


@pytest.mark.parametrize("score_bytes", [1, 40_000])  # one, and two tiles of queries per chunk
def test_chunks_of_queries_join(monkeypatch, score_bytes):
    monkeypatch.setattr(triton, "SCORE_BYTES", score_bytes)
    arrays = _inputs(300, 4, 2, block=32, rows=2)
    _assert_equal_to_reference(arrays, SelectRule(4, 0, 1, 32))


def test_scores_exist_for_one_chunk_at_a_time():
    tokens, blocks = 131072, 2048
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1, tokens, 1, 64), jnp.bfloat16),
            ((1, blocks, 1, 64), jnp.bfloat16),
            ((1, tokens, 1), jnp.float32),
            ((1, tokens, 2), jnp.int32),
            ((1, tokens), jnp.int32),
        )
    ]
    run = functools.partial(
        select_blocks,
        rule=SelectRule(32, 0, 1, 64),
        scale=0.1,
        **kernels("triton"),
    )
    largest = testing.largest_array(jax.make_jaxpr(run)(*arrays))
    assert 4 * largest <= triton.SCORE_BYTES
