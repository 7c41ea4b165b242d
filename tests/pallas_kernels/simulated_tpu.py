"""Runs TPU kernels on a model of a TPU: its memories, semaphores and copies in flight."""

import contextlib

from pallas_kernels.compat import pltpu


@contextlib.contextmanager
def simulated_tpu(capfd):
    """Interprets the kernels that start inside; fails on a race.

    Memory holds NaN until it is written. The first versions of the model print a race, the later
    ones raise.
    """
    model = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(model):
        yield
    assert "RACE DETECTED" not in capfd.readouterr().out
