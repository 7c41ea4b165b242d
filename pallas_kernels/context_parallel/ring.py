"""Attention over keys that are passed from device to device, each of which holds a shard of them.

A device keeps its queries. In every round it attends to the keys that it holds at the time and
merges the result with those of the rounds before, by their lse; then the keys move on. In the
backward pass the gradients of keys move with them. What a round adds to a gradient is what a
backward pass over its keys alone computes from the lse and the result of all rounds, so nothing of
a round is kept.

No round starts before the one before it is done, and no backward pass before the gradients that it
is about are there. Left alone, compilers attend to all shards at once, or keep those of the forward
pass for the backward pass; either takes the memory that a ring is to save. XLA's CPU backend
does so still.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import online_softmax

_together = jax.lax.optimization_barrier  # nothing that reads some of it starts before all of it

# Rounds per step of a loop. The compiler overlaps the transfer of one with the work of others. And
# XLA's CPU backend may deadlock where a loop with collectives runs beside other collectives, so a
# ring of up to 8 devices, as tests simulate, is no loop.
UNROLL = 8


@functools.partial(jax.custom_vjp, nondiff_argnames=("axis", "kernels", "configs"))
def ring_attention(queries, streams, readers, axis, kernels, configs):
    """As `sharded_attention`, whose mode "ring" this is.

    `kernels` are `AttentionKernels`, `configs` are `KernelConfig`s, one per reader.
    """
    return _forward(queries, streams, readers, axis, kernels, configs)[0]


def _forward(queries, streams, readers, axis, kernels, configs):
    def visit(held, totals, turn):
        shard = _shard(axis, turn)
        return tuple(
            _merge(total, _attend(kernel, reader, q, held, shard, axis, config))
            for total, q, reader, kernel, config in zip(
                totals, queries, readers, kernels, configs, strict=True
            )
        )

    def round_of(carry, turn):
        held, totals = carry
        return _together((axis.ring_shift(held), visit(held, totals, turn))), None

    nothing = tuple(
        (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf)) for q in queries
    )
    last = axis.size - 1
    (held, totals), _ = jax.lax.scan(round_of, (streams, nothing), jnp.arange(last), unroll=UNROLL)
    totals = visit(held, totals, last)
    outs = tuple(out.astype(q.dtype) for (out, _), q in zip(totals, queries, strict=True))
    lses = tuple(lse for _, lse in totals)
    return outs, (queries, streams, readers, outs, lses)


def _backward(axis, kernels, configs, residuals, douts):
    queries, streams, readers, outs, lses = residuals
    streams, douts = _together((streams, douts))

    def visit(held, dstreams, dqueries, turn):
        shard, sums = _shard(axis, turn), []
        for dquery, q, reader, kernel, config, out, lse, dout in zip(
            dqueries, queries, readers, kernels, configs, outs, lses, douts, strict=True
        ):
            k, v = reader.keys(held)
            saved = q, k, v, reader.sees(k, shard, axis), out, lse
            dq, dk, dv = kernel.backward(saved, dout, config)
            # float32 + any dtype is float32
            dstreams = jax.tree.map(jnp.add, dstreams, reader.gradients(dk, dv, held))
            sums.append(dquery + dq)
        return dstreams, tuple(sums)

    def round_of(carry, turn):
        held, dstreams, dqueries = carry
        dstreams, dqueries = visit(held, dstreams, dqueries, turn)
        return _together((*axis.ring_shift((held, dstreams)), dqueries)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (streams, queries))
    last = axis.size - 1
    start = streams, *zeros
    (held, dstreams, dqueries), _ = jax.lax.scan(round_of, start, jnp.arange(last), unroll=UNROLL)
    dstreams, dqueries = visit(held, dstreams, dqueries, last)
    grads = dqueries, axis.ring_shift(dstreams)  # home
    return *jax.tree.map(lambda x, like: x.astype(like.dtype), grads, (queries, streams)), None


ring_attention.defvjp(_forward, _backward)


def _attend(kernels, reader, q, streams, shard, axis, config):
    """out and lse over the keys of shard number `shard`, which are here."""
    k, v = reader.keys(streams)
    return kernels.forward(q, k, v, reader.sees(k, shard, axis), config)


def _merge(total, new):
    """Joins the (out, lse) over one set of keys with those over another, in float32."""
    m = online_softmax.finite(jnp.maximum(total[1], new[1]))
    weights = [jnp.exp(lse - m) for _, lse in (total, new)]
    outs = [weight[..., None] * out for weight, (out, _) in zip(weights, (total, new), strict=True)]
    l = sum(weights)
    safe = jnp.where(l == 0, 1.0, l)
    return sum(outs) / safe[..., None], jnp.where(l == 0, -jnp.inf, m + jnp.log(safe))


def _shard(axis, turn):
    """Whose keys are here after `turn` rounds."""
    return (axis.index() - turn) % axis.size
