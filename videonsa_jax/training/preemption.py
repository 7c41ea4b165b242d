"""The machine asks a run to stop: it saves, and ends with a code that says so."""

import signal
import threading

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # "temporary failure, try again" (EX_TEMPFAIL of sysexits.h)


class Preempted(Exception):
    """A run stopped because the machine asked for it; all of it is in its newest checkpoint."""


class PreemptionHandler:
    """Listens for SIGTERM, which schedulers send some time before they take a machine away.

    Of several processes any may get it; JAX makes all of them stop after the same step.
    """

    def __init__(self):
        self._got = threading.Event()
        self._before = None

    def __enter__(self):
        # Several processes: JAX listens. Signal handlers can be set in the main thread only.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._got.set())
        return self

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; asked after each one, on every process."""
        if jax.process_count() == 1:
            return self._got.is_set()
        return multihost_utils.reached_preemption_sync_point(step)
