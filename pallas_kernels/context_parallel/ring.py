"""Attention over keys that are passed from device to device, each of which holds a part of them.

A device keeps its queries. In every round it attends to the keys that it holds at the time and
merges the result with those of the rounds before, by their lse; then the keys move on. In the
backward pass the gradients of keys move with them. What a round adds to a gradient is what a
backward pass over its keys alone computes from the lse and the result of all rounds, so nothing of
a round is kept.

No round starts before the one before it is done, and no backward pass before the gradients that it
is about are there. Left alone, compilers attend to all parts at once, or keep those of the forward
pass for the backward pass; either takes the memory that a ring is to save. XLA's CPU backend
does so still.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import online_softmax as tile_math

_together = jax.lax.optimization_barrier  # nothing that reads a part of it starts before all of it

# Rounds per step of a loop. The compiler overlaps the transfer of one with the work of others. And
# XLA's CPU backend may deadlock where a loop with collectives runs beside other collectives, so a
# ring of up to 8 devices, as tests simulate, is no loop.
UNROLL = 8


@functools.partial(jax.custom_vjp, nondiff_argnames=("settings",))
def ring_attention(queries, keys, readers, settings):
    """As `sharded.attend`, whose mode "ring" this is."""
    return _forward(queries, keys, readers, settings)[0]


def _forward(queries, keys, readers, settings):
    axis = settings.axis

    def visit(keys, totals, turn):
        shard = _shard(axis, turn)
        return tuple(
            _merge(total, reader.forward(q, keys, shard, settings))
            for total, q, reader in zip(totals, queries, readers, strict=True)
        )

    def round_of(carry, turn):
        held, totals = carry
        return _together((axis.rotate(held), visit(held, totals, turn))), None

    nothing = tuple(
        (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf)) for q in queries
    )
    last = axis.size - 1
    (held, totals), _ = jax.lax.scan(round_of, (keys, nothing), jnp.arange(last), unroll=UNROLL)
    totals = visit(held, totals, last)
    outs = tuple(out.astype(q.dtype) for (out, _), q in zip(totals, queries, strict=True))
    lses = tuple(lse for _, lse in totals)
    return outs, (queries, keys, readers, outs, lses)


def _backward(settings, residuals, douts):
    queries, keys, readers, outs, lses = residuals
    keys, douts = _together((keys, douts))
    axis = settings.axis

    def visit(held, dkeys, dqueries, turn):
        shard, sums = _shard(axis, turn), []
        for dquery, q, reader, *results in zip(
            dqueries, queries, readers, outs, lses, douts, strict=True
        ):
            dq, new = reader.backward(q, held, shard, results, settings)
            dkeys = jax.tree.map(jnp.add, dkeys, new)  # float32 + any dtype is float32
            sums.append(dquery + dq)
        return dkeys, tuple(sums)

    def round_of(carry, turn):
        held, dkeys, dqueries = carry
        dkeys, dqueries = visit(held, dkeys, dqueries, turn)
        return _together((*axis.rotate((held, dkeys)), dqueries)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (keys, queries))
    last = axis.size - 1
    start = keys, *zeros
    (held, dkeys, dqueries), _ = jax.lax.scan(round_of, start, jnp.arange(last), unroll=UNROLL)
    dkeys, dqueries = visit(held, dkeys, dqueries, last)
    grads = dqueries, axis.rotate(dkeys)  # home
    return *jax.tree.map(lambda x, like: x.astype(like.dtype), grads, (queries, keys)), None


ring_attention.defvjp(_forward, _backward)


def _merge(total, new):
    """Joins the (out, lse) over one set of keys with those over another, in float32."""
    top = tile_math.finite(jnp.maximum(total[1], new[1]))
    weights = [jnp.exp(lse - top) for _, lse in (total, new)]
    outs = [weight[..., None] * out for weight, (out, _) in zip(weights, (total, new), strict=True)]
    both = sum(weights)
    safe = jnp.where(both == 0, 1.0, both)
    return sum(outs) / safe[..., None], jnp.where(both == 0, -jnp.inf, top + jnp.log(safe))


def _shard(axis, turn):
    """Whose keys are here after `turn` rounds."""
    return (axis.index() - turn) % axis.size
