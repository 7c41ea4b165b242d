"""A backend that is added from outside of the package, by its public names alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    BACKENDS,
    AttentionKernels,
    Backend,
    BlockSet,
    ChosenKeys,
    NSASpec,
    compressed_attention,
    dense_attention,
    interval_attention,
    nsa_attention,
    nsa_blocks,
    window_attention,
)
from tests import testing

SPEC = NSASpec(block_size=4, block_count=3, window_size=6)
TOKENS, HEADS, KV_HEADS, WIDTH = 21, 4, 2, 8


def _see(sees, k):
    """bool[b s k t] of a range mask or of chosen keys."""
    t = jnp.arange(k.shape[1])
    if isinstance(sees, ChosenKeys):
        members = sees.blocks.members(-(-k.shape[1] // sees.blocks.block))
        return members[..., t // sees.blocks.block] & (t <= sees.pos[..., None])[:, :, None]
    pos = t if sees.key_pos is None else sees.key_pos[:, None]
    see = (sees.lo[..., None] <= pos) & (pos < sees.hi[..., None])
    return jnp.broadcast_to(see[:, :, None], (*see.shape[:2], k.shape[2], see.shape[2]))


def _weights(q, k, sees, lse, scale):
    """[b s k g t], 0 where a key is not seen; `lse` None: normalised."""
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    logits = jnp.einsum("bskgh,btkh->bskgt", q, k, precision="highest") * scale
    logits = jnp.where(_see(sees, k)[:, :, :, None], logits, -jnp.inf)
    if lse is None:
        lse = jax.nn.logsumexp(logits, axis=-1).reshape(*q.shape[:2], -1)
    base = jnp.where(jnp.isneginf(lse), 0, lse).reshape(*logits.shape[:4], 1)
    return jnp.exp(logits - base), lse


def _forward(q, k, v, sees, config):
    weights, lse = _weights(q, k, sees, None, config.scale)
    return jnp.einsum("bskgt,btkh->bskgh", weights, v, precision="highest").reshape(q.shape), lse


def _backward(residuals, dout, config):
    q, k, v, sees, out, lse = residuals

    def result(q, k, v):  # weights whose sum does not depend on q and k, so minus the mean of v
        weights, _ = _weights(q, k, sees, lse, config.scale)
        out_of = jnp.einsum("bskgt,btkh->bskgh", weights, v, precision="highest").reshape(q.shape)
        total = weights.sum(-1).reshape(*q.shape[:3], 1)
        return out_of - (total - jax.lax.stop_gradient(total)) * out

    return jax.vjp(result, q, k, v)[1](dout)


def _select(q, k, lse, visible, own, rule, config):
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    logits = jnp.einsum("bskgh,bckh->bskgc", q, k, precision="highest") * config.scale
    base = jnp.where(jnp.isneginf(lse), 0, lse).reshape(*logits.shape[:4], 1)
    j, first = jnp.arange(k.shape[1]), visible[..., :1]
    seen = (first <= j) & (j < visible[..., 1:])
    scores = jnp.where(seen[:, :, None], jnp.exp(logits - base).sum(3), 0)
    candidate = (first <= j) & (j <= own[..., None])
    forced = (j < first + rule.num_init_blocks) | (j > own[..., None] - rule.num_local_blocks)
    scores = jnp.where(forced[:, :, None], jnp.inf, scores)
    best, ids = jax.lax.top_k(jnp.where(candidate[:, :, None], scores, -1), rule.top_k)
    return BlockSet.of_ids(jnp.where(best >= 0, ids, -1), k.shape[1], rule.block)


def _unsupported_reason(call, *, backward):
    return None if call.width == WIDTH else f"the toy takes heads of {WIDTH}, not {call.width}"


KERNELS = AttentionKernels(_forward, _backward)
TOY = Backend("toy", None, KERNELS, KERNELS, _select, _unsupported_reason)


@pytest.fixture
def toy():
    BACKENDS.insert(0, TOY)
    yield TOY
    BACKENDS.remove(TOY)


def _arrays(width=WIDTH):
    """q, k, v, gates."""
    rng = np.random.default_rng(0)
    shapes = (HEADS, width), (KV_HEADS, width), (KV_HEADS, width)
    q, k, v = (jnp.asarray(rng.standard_normal((1, TOKENS, *x)), jnp.float32) for x in shapes)
    return q, k, v, jax.nn.sigmoid(jnp.asarray(rng.standard_normal((1, TOKENS, HEADS, 3))))


POS = jnp.arange(TOKENS, dtype=jnp.int32)[None]
RANGES = jnp.stack([POS // 5 * 5, jnp.minimum(POS // 5 * 5 + 5, TOKENS)], axis=-1)
OPERATIONS = {
    "nsa": lambda q, k, v, gates, **how: nsa_attention(q, k, v, gates, spec=SPEC, **how),
    "window": lambda q, k, v, _, **how: window_attention(
        q, k, v, 0 * POS, POS, window=6, scale=0.3, **how
    ),
    "compressed": lambda q, k, v, _, **how: compressed_attention(q, k, v, RANGES, scale=0.3, **how)[
        0
    ],
    "interval": lambda q, k, v, _, **how: interval_attention(
        q, k, v, interval=RANGES, max_length=5, **how
    ),
    "dense": lambda q, k, v, _, **how: dense_attention(
        q, k, v, start=0 * POS, query_pos=POS, key_pos=POS, **how
    ),
}


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_and_its_gradients_run_on_a_backend_from_outside(op):
    @functools.partial(jax.jit, static_argnums=0)
    def both(implementation, *arrays):
        run = functools.partial(OPERATIONS[op], implementation=implementation)
        out, vjp = jax.vjp(run, *arrays)
        return out, *vjp(jnp.cos(out))

    results = (both(name, *_arrays()) for name in ("toy", "reference"))
    for name, got, want in zip("oqkvg", *results, strict=True):
        testing.assert_close(name, got, want)


@pytest.mark.usefixtures("toy")
def test_it_selects_the_blocks_of_the_reference():
    q, k, *_ = _arrays()
    got, want = (nsa_blocks(q, k, spec=SPEC, implementation=x) for x in ("toy", "reference"))
    np.testing.assert_array_equal(got.bits, want.bits)


def test_none_takes_the_first_that_supports_the_call(toy):
    """Its own fused operation shows which one ran."""
    ones = dataclasses.replace(toy, fused_nsa=lambda q, *_: jnp.ones_like(q))
    BACKENDS[0] = ones
    try:
        run = jax.jit(OPERATIONS["nsa"])
        assert (run(*_arrays()) == 1).all()
        assert not (run(*_arrays(width=16)) == 1).all()
    finally:
        BACKENDS[0] = toy


@pytest.mark.usefixtures("toy")
def test_its_name_runs_or_says_why_not():
    with pytest.raises(ValueError, match="the toy takes heads of 8, not 16"):
        OPERATIONS["window"](*_arrays(width=16), implementation="toy")


def test_without_it_its_name_is_unknown():
    with pytest.raises(ValueError, match="implementation='toy' is unknown; use one of"):
        OPERATIONS["window"](*_arrays(), implementation="toy")
