"""A process that opens images and videos for another one, which outlives what they do to it.

DecoderProcess starts this module as a program, which imports neither JAX nor the tokenizer.
Messages are pickles, followed by their arrays as they are in memory.
"""

import contextlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any

from videonsa_jax.data import processor, visuals  # noqa: F401  before the first request
from videonsa_jax.data.errors import BadSample, Stage, about_sample
from videonsa_jax.data.visuals import Reference
from videonsa_jax.errors import UserError

START_TIMEOUT_S = 120.0  # for imports from a slow disk
END_TIMEOUT_S = 5.0  # for a killed process to disappear
# What schedulers and terminals send to all processes of a run; whether to end, the parent decides.
NOTICES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class DecoderLost(Exception):
    """The process hung or died; the text says which."""


class DecoderProcess:
    """A process that answers one request at a time."""

    def __init__(self):
        """Raises UserError: it does not start."""
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno())]
        one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # NumPy's, unused
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **one_thread},
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # whatever a decoder prints belongs to the log
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            self._exchange(None, START_TIMEOUT_S)
        except (OSError, DecoderLost) as error:
            raise UserError(f"no decoder process starts ({' '.join(command)}): {error}") from error

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def run(self, reference: Reference, stage: Stage, args: tuple, timeout_s: float) -> Any:
        """`getattr(reference, stage)(*args)`.

        Raises:
          BadSample: the file is bad.
          DecoderLost: it took too long, or killed the process; the process is ended then.
        """
        try:
            answer = self._exchange((reference, stage, args, timeout_s), timeout_s)
        except TimeoutError as error:
            raise DecoderLost(f"took longer than data.decode_timeout_s={timeout_s:g}") from error
        if isinstance(answer, BadSample):
            raise answer
        return answer

    def kill(self) -> None:
        """Whoever waits for its answer learns that it is lost."""
        self._process.kill()

    def end(self) -> None:
        """For whoever holds it alone."""
        self.kill()
        self._wait()
        self._socket.close()

    def _exchange(self, request: Any, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        try:
            _send(self._socket, request, deadline)
            return _receive(self._socket, deadline)
        except TimeoutError:
            self.end()
            raise
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            reason = self._death()
            self.end()
            raise DecoderLost(reason) from error
        except BaseException:  # part of an answer may be left, which is not the next one's
            self.end()
            raise

    def _death(self) -> str:
        self._wait()
        code = self._process.returncode
        if code is None:
            return "stopped answering"
        if code >= 0:
            return f"ended with exit code {code}"
        hint = ", as when memory runs out" if code == -signal.SIGKILL else ""
        return f"was killed ({signal.Signals(-code).name}{hint})"

    def _wait(self) -> None:
        # one that waits for a disk that does not answer stays, until the disk does
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)


def serve(fd: int) -> None:
    """Answers requests until the other end of the socket `fd` is closed."""
    for notice in NOTICES:
        signal.signal(notice, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(fd,), daemon=True).start()
    with socket.socket(fileno=fd) as parent, contextlib.suppress(EOFError, ConnectionError):
        while True:
            request = _receive(parent)
            _send(parent, request and _answer(*request))


def _answer(reference: Reference, stage: Stage, args: tuple, timeout_s: float) -> Any:
    # ends this process also where a decoder holds Python's lock and the parent is gone
    signal.setitimer(signal.ITIMER_REAL, timeout_s + END_TIMEOUT_S)
    try:
        with about_sample(reference.name):
            return getattr(reference, stage)(*args)
    except BadSample as bad:
        return bad
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _end_with_parent(fd: int) -> None:
    """Ends a decoder at work too; the parent may have been killed."""
    hung_up = select.poll()
    hung_up.register(fd, 0)
    hung_up.poll()
    os._exit(0)


def _send(to: socket.socket, value: Any, deadline: float | None = None) -> None:
    arrays: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    parts = [memoryview(body), *(array.raw() for array in arrays)]
    sizes = struct.pack(f"<Q{len(parts)}Q", len(parts), *(part.nbytes for part in parts))
    for part in (sizes, *parts):
        to.settimeout(_left(deadline))
        to.sendall(part)


def _receive(source: socket.socket, deadline: float | None = None) -> Any:
    (count,) = struct.unpack("<Q", _read(source, 8, deadline))
    sizes = struct.unpack(f"<{count}Q", _read(source, 8 * count, deadline))
    body, *arrays = [_read(source, size, deadline) for size in sizes]
    return pickle.loads(body, buffers=arrays)


def _read(source: socket.socket, size: int, deadline: float | None) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        source.settimeout(_left(deadline))
        count = source.recv_into(rest)
        if not count:
            raise EOFError
        rest = rest[count:]
    return data


def _left(deadline: float | None) -> float | None:
    """Seconds; raises TimeoutError where there are none."""
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


if __name__ == "__main__":
    serve(int(sys.argv[1]))
