"""A few decoder processes that threads share, and the memory of files that hung or killed one."""

import contextlib
import threading
from collections.abc import Iterator, Mapping

from videonsa_jax.data.decoder_process import DecoderLost, DecoderProcess
from videonsa_jax.data.errors import BadSample, Stage, about_sample
from videonsa_jax.data.sampling import Frames, SamplingRule, Transform
from videonsa_jax.data.visuals import Outline, Reference

DONE = {"outline": "looked at", "read": "decoded"}  # what was being done to the file

LostFiles = Mapping[tuple[str, Stage], str]  # (file, where it was lost) -> the reason


class DecoderPool:
    """Opens references elsewhere; processes start when they are needed and are used again.

    A pool that is pickled, as for a worker, starts processes of its own.
    """

    def __init__(self, processes: int = 1, timeout_s: float = 0.0, lost: LostFiles | None = None):
        """Takes limits.

        Args:
          processes: the most at a time; further threads wait.
          timeout_s: seconds that a file may take; 0: open files in this process, without a limit.
          lost: files that are not to be tried again.
        """
        self._processes, self._timeout_s, self._lost = processes, timeout_s, dict(lost or {})
        self._free = threading.BoundedSemaphore(processes)
        self._idle: list[DecoderProcess] = []
        self._busy: set[DecoderProcess] = set()
        self._lock = threading.Lock()
        self._is_closed = False

    def __reduce__(self):
        return DecoderPool, (self._processes, self._timeout_s, self._lost)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def outline(self, reference: Reference, rule: SamplingRule) -> Outline:
        """`reference.outline(rule)`; raises BadSample, UserError where no process starts."""
        return self._run(reference, "outline", rule)

    def read(self, reference: Reference, rule: SamplingRule, transform: Transform) -> Frames:
        """`reference.read(rule, transform)`; raises like `outline`."""
        return self._run(reference, "read", rule, transform)

    def close(self) -> None:
        """Ends all processes; files that are being opened are bad then."""
        with self._lock:
            self._is_closed = True
            for process in self._busy:
                process.kill()
            while self._idle:
                self._idle.pop().end()

    def _run(self, reference: Reference, stage: Stage, *args):
        name = reference.name
        if (name, stage) in self._lost:
            raise BadSample(name, self._lost[name, stage], stage)
        if not self._timeout_s:
            with about_sample(name):
                return getattr(reference, stage)(*args)
        try:
            with self._borrowed() as process:
                return process.run(reference, stage, args, self._timeout_s)
        except DecoderLost as lost:
            if self._is_closed:
                raise BadSample(name, "was not opened: the run ended") from lost
            self._lost[name, stage] = (
                f"while it was {DONE[stage]}, its decoder process {lost}; it is not tried again "
                "while this line is listed"
            )
            raise BadSample(name, self._lost[name, stage], stage) from lost

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[DecoderProcess]:
        with self._free:
            process = self._take_idle() or DecoderProcess()
            with self._lock:
                self._busy.add(process)
                if self._is_closed:
                    process.kill()
            try:
                yield process
            finally:
                self._give_back(process)

    def _take_idle(self) -> DecoderProcess | None:
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.is_alive:
                    return process
                process.end()
            if self._is_closed:
                raise DecoderLost("is not started any more")
        return None

    def _give_back(self, process: DecoderProcess) -> None:
        with self._lock:
            self._busy.discard(process)
            if process.is_alive and not self._is_closed:
                self._idle.append(process)
                return
        process.end()
