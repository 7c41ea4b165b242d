"""The compiled gradients of a tiny run on simulated devices, and what these exchange."""

import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import traverse_util

from tests import synthetic
from videonsa_jax.aot.hlo import Collective, Program
from videonsa_jax.config.run import RunConfig
from videonsa_jax.sharding import shard
from videonsa_jax.sharding.mesh import make_mesh
from videonsa_jax.training import state as state_lib
from videonsa_jax.training.optimizer import Optimizer
from videonsa_jax.training.step import gradients


class GradientProgram:
    """Loss and gradients of one batch under the mesh and the sharding of a config."""

    def __init__(
        self,
        cfg: RunConfig,
        arrays: Mapping[str, np.ndarray],
        *,
        frame_patches: int = synthetic.FRAME_PATCHES,
        devices: Sequence[jax.Device] | None = None,
    ):
        """`arrays` are those of `Batch`."""
        optimizer = Optimizer(cfg.optim, steps=1)
        self.mesh = make_mesh(cfg.mesh, devices)
        with jax.set_mesh(self.mesh):
            graphdef, layouts = state_lib.abstract_model(cfg, self.mesh)
            abstract = state_lib.abstract_state(layouts, optimizer, self.mesh)
            state = state_lib.initial_state(cfg, optimizer, abstract)
            trained, frozen = optimizer.split(state.params)
            whole = shard.replicated(self.mesh)
            places = {path: x.sharding for path, x in trained.items()}
            batch = shard.global_batch(arrays, frame_patches, cfg.sharding, self.mesh)
            self._arguments = trained, frozen, batch
            jitted = jax.jit(
                functools.partial(gradients, graphdef, optimizer),
                out_shardings=(whole, whole, places),
            )
            self._compiled = jitted.lower(*self._arguments).compile(synthetic.FAST_COMPILE)
        self.shardings = {
            path: x.sharding
            for path, x in traverse_util.flatten_dict(abstract.params, sep="/").items()
        }

    def run(self) -> tuple[float, dict[str, np.ndarray]]:
        """The loss, and the gradients by path; they lie where the parameters lie."""
        loss, _, grads = self._compiled(*self._arguments)
        assert all(x.sharding == self.shardings[path] for path, x in grads.items())
        return jax.device_get((loss, grads))

    @functools.cached_property
    def text(self) -> Program:
        """The compiled program."""
        return Program(self._compiled.as_text())

    def exchanges(self) -> list[Collective]:
        """What the devices exchange."""
        return self.text.collectives(dict(self.mesh.shape))


def assert_equal(got: GradientProgram, want: GradientProgram) -> None:
    """Fails unless loss and gradients are equal to 1e-5 of the largest number of each."""
    (loss, grads), (want_loss, want_grads) = got.run(), want.run()
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    for path, expected in want_grads.items():
        error = np.abs(grads[path] - expected).max()
        assert error <= 1e-5 * np.abs(expected).max() + 1e-8, f"{path}: {error}"
