"""One step: parts of a batch add up, non-finite batches change nothing, frozen groups stay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from tests import synthetic
from videonsa_jax.batch import Batch
from videonsa_jax.errors import UserError
from videonsa_jax.sharding.mesh import make_mesh
from videonsa_jax.training import state as state_lib
from videonsa_jax.training.optimizer import Optimizer, group_of
from videonsa_jax.training.step import CompiledStep, gradients


def make_batch(**changes) -> Batch:
    return Batch(**{**synthetic.batch(0), **changes}, frame_patches=synthetic.FRAME_PATCHES)


@functools.cache
def model_and_params():
    model = state_lib.build_model(synthetic.run_config())
    graphdef, params = nnx.split(model)
    return graphdef, nnx.to_pure_dict(params)


def gradients_of(grad_accum_steps: int, batch: Batch):
    graphdef, params = model_and_params()
    cfg = synthetic.run_config(optim={"grad_accum_steps": grad_accum_steps})
    optimizer = Optimizer(cfg.optim, steps=4)
    trained, frozen = optimizer.split(params)
    jitted = jax.jit(
        functools.partial(gradients, graphdef, optimizer),
        compiler_options=synthetic.FAST_COMPILE,
    )
    return jitted(trained, frozen, batch)


def test_accumulated_parts_equal_one_big_batch():
    weights = synthetic.batch(0)["text_weights"]
    weights[1::2] *= 0.25  # the parts have different totals: dividing part by part would show
    batch = make_batch(text_weights=weights)
    whole, parts = gradients_of(1, batch), gradients_of(4, batch)
    for got, want in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()) + 1e-9)


def test_rows_that_do_not_divide_are_rejected():
    with pytest.raises(UserError, match=r"8 rows a step cannot be cut into .*grad_accum_steps=3"):
        gradients_of(3, make_batch())


@pytest.fixture(scope="module")
def started():
    """A step function with a frozen vision tower, and the state after one good batch."""
    cfg = synthetic.run_config(optim={"freeze": ("vision",)})
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    optimizer = Optimizer(cfg.optim, cfg.train.steps)
    graphdef, layouts = state_lib.abstract_model(cfg, mesh)
    abstract = state_lib.abstract_state(layouts, optimizer, mesh)
    step = CompiledStep(graphdef, optimizer, state_lib.shardings(abstract), mesh)
    with jax.set_mesh(mesh):
        first = state_lib.initial_state(cfg, optimizer, abstract)
        initial = jax.tree.map(np.array, first)
        assert step.compile(first, make_batch()) > 0
        state, metrics = step(first, make_batch())
        assert np.isfinite(metrics["loss"])
        yield step, initial, jax.tree.map(np.array, state)


def on_device(state):
    return jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), state)


def test_a_frozen_group_stays_and_the_others_move(started):
    _, initial, state = started
    before = traverse_util.flatten_dict(initial.params, sep="/")
    after = traverse_util.flatten_dict(state.params, sep="/")
    moved = {path for path in before if (before[path] != after[path]).any()}
    assert moved == {path for path in before if group_of(path) != "vision"}


def test_a_batch_of_a_known_shape_is_not_compiled_again(started):
    step, initial, _ = started
    assert step.compile(initial, make_batch()) is None


def test_a_non_finite_batch_changes_only_the_counters(started):
    step, _, before = started
    bad = make_batch(patches=np.full_like(make_batch().patches, np.nan))
    state = on_device(before)
    for count in (1, 2):
        state, metrics = step(state, bad)
        assert not np.isfinite(metrics["loss"])
        assert state.skipped == state.consecutive_bad == count
        assert state.step == 1 + count
        jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
        jax.tree.map(np.testing.assert_array_equal, state.opt_state, before.opt_state)


def test_a_good_batch_after_bad_ones_ends_the_row(started):
    step, _, before = started
    bad = make_batch(patches=np.full_like(make_batch().patches, np.nan))
    state, bad_metrics = step(on_device(before), bad)
    state, metrics = step(state, make_batch())
    assert (int(state.skipped), int(state.consecutive_bad)) == (1, 0)
    assert metrics["lr"] == bad_metrics["lr"]  # a skipped step does not advance the schedule
    assert (state.params["text"]["norm"]["scale"] != before.params["text"]["norm"]["scale"]).any()
