"""Traces a window of steps, for TensorBoard's profiler and Perfetto."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax

FOLDER = "profile"  # inside a run's working directory


class StepProfiler:
    """The steps first..last of a run, or none. As a context, it ends a trace that is left open."""

    def __init__(self, workdir: pathlib.Path, steps: tuple[int, int] | None):
        self._folder = workdir / FOLDER
        self._steps = range(0) if steps is None else range(steps[0], steps[1] + 1)
        self._open = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._open:
            self._open = False
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around each step: starts the trace before the first one, ends it after the last."""
        if step in self._steps and not self._open:
            self._open = True
            jax.profiler.start_trace(self._folder)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if step + 1 not in self._steps:
            self.__exit__()
