"""Next-token loss of the text stream, computed in chunks so that no f32[b s v] array exists."""

import jax
import jax.numpy as jnp

from videonsa_jax.batch import Batch
from videonsa_jax.model.model import VideoNSA

CHUNK_TOKENS = 1024  # of each row; logits of one chunk exist at a time, in both passes


def next_token_loss(
    model: VideoNSA, hidden: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Weighted negative log-likelihood of `batch.text_targets`, in nats.

    Sums, not means: the caller divides once, over all rows, devices and accumulated batches.

    Args:
      model: gives the logits.
      hidden: f[b s d], the model's output for `batch`.
      batch: targets and weights.

    Returns:
      loss: f32[] sum of weight x NLL.
      weight: f32[] sum of weights.
      metrics: "correct", f32[]: sum of weights where the target is the likeliest token.
    """
    axis = model.rules.mesh_axis("seq")
    parts = 1 if axis is None else axis.size  # of a row, on as many devices; a chunk takes of all
    tokens = hidden.shape[1] // parts
    chunk = min(tokens, max(CHUNK_TOKENS // parts, 1))

    def chunked(x):  # [b s ...] -> [chunks b parts chunk ...]
        x = x.reshape(x.shape[0], parts, tokens, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -tokens % chunk), *((0, 0),) * (x.ndim - 3)))
        x = x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:])
        return model.rules.constrain(jnp.moveaxis(x, 2, 0), None, "batch", "seq")

    @jax.checkpoint
    def step(totals, xs):
        hidden, targets, weights = xs
        logits = model.rules.constrain(model.logits(hidden), "batch", "seq", None, "act_vocab")
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - chosen
        correct = weights * (logits.argmax(axis=-1) == targets)
        sums = jnp.sum(weights * nll), jnp.sum(weights), jnp.sum(correct)
        return jax.tree.map(jnp.add, totals, sums), None

    xs = jax.tree.map(chunked, (hidden, batch.text_targets, batch.text_weights))
    totals, _ = jax.lax.scan(step, (jnp.float32(0),) * 3, xs)
    loss, weight, correct = totals
    return loss, weight, {"correct": correct}
