"""What a program's memory is for, and how long it takes at least: models, not measurements."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from videonsa_jax.aot import programs
from videonsa_jax.aot.hlo import Collective
from videonsa_jax.aot.programs import RowShape
from videonsa_jax.aot.topology import Chip
from videonsa_jax.config.run import RunConfig
from videonsa_jax.training import state as state_lib
from videonsa_jax.training.optimizer import Optimizer

# Bytes per second and device between groups of devices: a card of 200 Gbit/s for four of them.
DCN_RATE = 6.25e9


@dataclasses.dataclass(frozen=True)
class Kinds:
    """Bytes of one device that are known by what they hold.

    Attributes:
      parameters: as they are stored.
      optimizer: its state.
      batch: the rows of a step.
      gradients: the sum over the parts of a step.
      activations: what layers keep for the backward pass where all else is recomputed, their
        inputs; 0 in other modes, whose activations count among the temporaries.
    """

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    activations: int


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step at peak rates, were there nothing else to do.

    Attributes:
      compute_s: of the arithmetic that runs.
      memory_s: of writing and reading once all that the program writes.
      links_s: of receiving what other devices send.
      step_s: the largest of them.
      mfu: the arithmetic that the result needs, as a fraction of what the devices could do.
      limit: which of them is the largest: "compute", "memory" or "links".
    """

    compute_s: float
    memory_s: float
    links_s: float
    step_s: float
    mfu: float
    limit: str


def kinds_of_memory(cfg: RunConfig, mesh: Mesh, shape: RowShape, phase: str) -> Kinds:
    """Of one device, in the training step or the prefill of `programs`."""
    _, layouts = state_lib.abstract_model(cfg, mesh)
    batch = _held(programs.abstract_batch(cfg, mesh, shape))
    numbers = sum(layout.bytes_per_device for layout in layouts)
    if phase == "prefill":
        width = jax.numpy.dtype(cfg.compute.dtype).itemsize
        return Kinds(numbers * width // 4, 0, batch, 0, 0)
    optimizer = Optimizer(cfg.optim, cfg.train.steps)
    state = state_lib.abstract_state(layouts, optimizer, mesh)
    trained, _ = optimizer.split(state.params)
    activations = 0
    if cfg.compute.remat in ("full", "save_selection"):
        activations = _layer_inputs(cfg, mesh, shape)
    return Kinds(numbers, _held(state.opt_state), batch, _held(trained), activations)


def _held(tree):
    """Bytes of one device's parts of abstract arrays."""
    return sum(
        jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype).size * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _layer_inputs(cfg, mesh, shape):
    """Of the rows that are computed at a time, split as `Rules` splits rows and sequences."""
    vision, text = cfg.model.vision, cfg.model.text
    rows = shape.rows // cfg.optim.grad_accum_steps

    def tokens(count):
        layout = jax.sharding.NamedSharding(mesh, cfg.sharding.spec("batch", "seq"))
        local_rows, local = layout.shard_shape((rows, count))
        return local_rows * local

    tower = vision.num_layers * vision.d_model * tokens(shape.vision_tokens * vision.merge_size**2)
    decoder = text.num_layers * text.d_model
    decoder *= tokens(shape.vision_tokens) + tokens(shape.text_tokens)
    return (tower + decoder) * jax.numpy.dtype(cfg.compute.dtype).itemsize


def estimate(
    chip: Chip, needed: float, executed: float, written: int, collectives: Sequence[Collective]
) -> Times:
    """A bound from below: rates at their peak, and perfectly overlapped.

    Args:
      chip: its rates.
      needed: operations of one device that the result needs.
      executed: operations that run, recomputation included.
      written: bytes that the program writes.
      collectives: exchanges; those along "dcn" go at `DCN_RATE`.
    """
    links = sum(
        x.bytes / (DCN_RATE if "dcn" in x.axis.split("+") else chip.link_rate) for x in collectives
    )
    times = {
        "compute": executed / chip.flops,
        "memory": 2 * written / chip.memory_rate,
        "links": links,
    }
    limit = max(times, key=times.get)
    step = times[limit]
    return Times(times["compute"], times["memory"], links, step, needed / chip.flops / step, limit)
