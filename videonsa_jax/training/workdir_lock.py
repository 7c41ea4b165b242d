"""One run at a time in a working directory."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import sys
from collections.abc import Iterator
from typing import TextIO

from videonsa_jax.errors import UserError, describe_file_error
from videonsa_jax.training import processes

FILE = "run.lock"  # empty, or the last holder's details


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
    """Inside, no other run gets the folder. Process 0 holds it for all processes of the run.

    The operating system takes the lock away from a process that ends, however it ends.

    Raises:
      UserError: another run holds it, or the folder cannot be written; on every process.
    """
    with contextlib.ExitStack() as stack:
        processes.from_first(lambda: _take(workdir, stack))
        yield


def _take(workdir: pathlib.Path, stack: contextlib.ExitStack) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context((workdir / FILE).open("a+"))
        _lock(workdir, file)
        here = socket.gethostname()
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        file.truncate(0)
        file.write(json.dumps({"host": here, "process": os.getpid(), "since": now}))
        file.flush()
    except OSError as error:
        raise UserError(describe_file_error(error, workdir)) from error
    stack.callback(file.truncate, 0)


def _lock(workdir: pathlib.Path, file: TextIO) -> None:
    # On NFS, Linux turns flock into a lock on the server, which other hosts see. Mounted with
    # `nolock` or `local_lock`, and on some cluster file systems, it holds within one host only;
    # a few refuse it. There a run that another host may still hold is named, and does not block:
    # nothing tells it from a killed one.
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{workdir} is in use by a run on {_holder(file) or 'an unknown host'}; wait for it, "
            f"stop it, or choose another --workdir"
        ) from None
    except OSError as error:
        _warn(f"{workdir} cannot be locked ({error.strerror}); see that no other run uses it")
    before = _holder(file)
    if before and not before.startswith(f"host {socket.gethostname()},"):
        _warn(f"{workdir} was last used by a run on {before}, which did not end by itself")


def _holder(file: TextIO) -> str | None:
    file.seek(0)
    try:
        stored = json.loads(file.read())
        return f"host {stored['host']}, process {stored['process']}, since {stored['since']}"
    except (ValueError, KeyError, TypeError):
        return None  # ended by itself, or was killed while it wrote


def _warn(line: str) -> None:
    sys.stderr.write(line + "\n")
