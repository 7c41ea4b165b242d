"""One training step: accumulated gradients, then an update unless something is not finite."""

import functools
import time
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from videonsa_jax.batch import Batch
from videonsa_jax.errors import UserError
from videonsa_jax.sharding.shard import replicated
from videonsa_jax.training.loss import next_token_loss
from videonsa_jax.training.optimizer import Optimizer
from videonsa_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


class CompiledStep:
    """`train_step`, compiled once for each shape of batch, ahead of time so that it can be told."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        optimizer: Optimizer,
        state_shardings: TrainState,
        mesh: Mesh,
    ):
        self._jitted = jax.jit(
            functools.partial(train_step, graphdef, optimizer),
            out_shardings=(state_shardings, replicated(mesh)),
            donate_argnums=0,
        )
        self._programs = {}

    def compile(self, state: TrainState, batch: Batch) -> float | None:
        """Seconds it took; None if batches of this shape are compiled already."""
        if _shape(batch) in self._programs:
            return None
        started = time.perf_counter()
        self._programs[_shape(batch)] = self.lower(state, batch).compile()
        return time.perf_counter() - started

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The program before it is compiled; abstract arrays will do."""
        return self._jitted.lower(state, batch)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Donates `state`; the batch's shape must have been compiled."""
        return self._programs[_shape(batch)](state, batch)


def _shape(batch: Batch) -> Hashable:
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple(leaf.shape for leaf in leaves)


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
    loss, accuracy, grads = gradients(graphdef, optimizer, trained, frozen, batch)
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
        "lr": optimizer.learning_rate(optimizer.cfg.lr)(state.step - state.skipped),
        "tokens": (batch.text_order >= 0).sum() + (batch.vision_order >= 0).sum(),
        "skipped": new.skipped,
        "consecutive_bad": new.consecutive_bad,
    }


def gradients(
    graphdef: nnx.GraphDef, optimizer: Optimizer, trained: dict, frozen: dict, batch: Batch
) -> tuple[jax.Array, jax.Array, dict]:
    """Loss per target, accuracy, and the gradients of the loss, part of the rows by part.

    Every part is divided by the target weights of the whole batch, so the number of parts does not
    change the result.

    Args:
      graphdef: the model's structure.
      optimizer: says in how many parts.
      trained: flat parameters to differentiate by.
      frozen: the other ones.
      batch: all rows of the step.

    Returns:
      (f32[], f32[], flat float32 gradients of `trained`).

    Raises:
      UserError: the rows cannot be cut into that many parts.
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
    total, _ = jax.lax.scan(add_part, zero, _parts(batch, optimizer.cfg.grad_accum_steps))
    return total


def _parts(batch: Batch, count: int) -> Batch:
    """[b ...] -> [count b/count ...]; part i has rows i, i + count, ..., some of every device."""

    rows = len(batch.text_tokens)
    if rows % count:
        raise UserError(
            f"{rows} rows a step cannot be cut into config.optim.grad_accum_steps={count}"
        )

    def split(x):
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)
