"""One training step: accumulated gradients, then an update unless something is not finite."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from videonsa_jax.batch import Batch
from videonsa_jax.loss import next_token_loss
from videonsa_jax.optimizer import Optimizer
from videonsa_jax.state import TrainState

Metrics = dict[str, jax.Array]


def train_step(
    graphdef: nnx.GraphDef, optimizer: Optimizer, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """Pure; jitted once by the training program.

    A batch whose loss or gradient is not finite changes neither parameters nor optimizer state; it
    is counted, and the step counter advances, because the batch was consumed.

    Args:
      graphdef: the model's structure, static.
      optimizer: the update rule, static.
      state: donated.
      batch: all rows of the step, over all devices and processes.

    Returns:
      The next state, and metrics as scalars: loss (nats per target), accuracy (of the targets),
      grad_norm (before clipping), lr, tokens (not padding), and the state's counters.
    """
    trained, frozen = optimizer.split(state.params)
    loss, accuracy, grads = _gradients(graphdef, optimizer, trained, frozen, batch)
    grad_norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    updates, opt_state = optimizer.transformation().update(grads, state.opt_state, trained)
    updated = (optax.apply_updates(trained, updates), opt_state)
    trained, opt_state = jax.tree.map(
        lambda new, old: jnp.where(good, new, old), updated, (trained, state.opt_state)
    )
    new = TrainState(
        step=state.step + 1,
        skipped=state.skipped + ~good,
        consecutive_bad=jnp.where(good, 0, state.consecutive_bad + 1),
        params=optimizer.join(trained, frozen),
        opt_state=opt_state,
    )
    return new, {
        "loss": loss,
        "accuracy": accuracy,
        "grad_norm": grad_norm,
        "lr": optimizer.learning_rate(state.step - state.skipped, optimizer.cfg.lr),
        "tokens": (batch.text_order >= 0).sum() + (batch.vision_order >= 0).sum(),
        "skipped": new.skipped,
        "consecutive_bad": new.consecutive_bad,
    }


def _gradients(
    graphdef: nnx.GraphDef, optimizer: Optimizer, trained: dict, frozen: dict, batch: Batch
) -> tuple[jax.Array, jax.Array, dict]:
    """(loss, accuracy, gradients of `trained`), summed over parts of the rows one after the other.

    Every part is divided by the target weights of the whole batch, so the number of parts does not
    change the result.
    """
    weight = batch.text_weights.sum()

    def loss_fn(trained, part):
        model = nnx.merge(graphdef, optimizer.join(trained, frozen))
        hidden, _ = model(part)
        loss, _, metrics = next_token_loss(model, hidden, part)
        return loss / weight, metrics["correct"] / weight

    def add_part(total, part):
        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained, part)
        return jax.tree.map(jnp.add, total, (loss, accuracy, grads)), None

    zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
    total, _ = jax.lax.scan(add_part, zero, _parts(batch, optimizer.cfg.accumulation))
    return total


def _parts(batch: Batch, count: int) -> Batch:
    """[b ...] -> [count b/count ...]; part i has rows i, i + count, ..., some of every device."""

    def split(x):
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)
