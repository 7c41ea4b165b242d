"""What is wrong with one sample, as opposed to wrong with the program."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Literal

from videonsa_jax.errors import UserError

Stage = Literal["outline", "read"]  # of a file: a look at its header, or decoding it

LONGEST_REASON = 500  # characters; records and libraries put values of any length into theirs


class BadSample(Exception):
    """A sample that cannot be used; its text is one line that names the file and the reason."""

    def __init__(self, file: str, reason: str, lost_in: Stage | None = None):
        """`lost_in`: where the file hung or killed its decoder; None: it did neither."""
        super().__init__(file, reason, lost_in)
        self.file = file
        reason = " ".join(reason.split())
        self.reason = reason if len(reason) <= LONGEST_REASON else reason[:LONGEST_REASON] + "..."
        self.lost_in = lost_in

    def __str__(self) -> str:
        line = f"{self.file}: {self.reason}"
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def check_is_file(path: str | pathlib.Path) -> None:
    """Raises BadSample: it is missing, empty, or no regular file, which opening might block on."""
    if not os.path.exists(path):
        raise BadSample(str(path), "no such file")
    if not os.path.isfile(path):
        raise BadSample(str(path), "is no file, but a folder or a device")
    if not os.path.getsize(path):
        raise BadSample(str(path), "is an empty file of 0 bytes")


@contextlib.contextmanager
def about_sample(name: str) -> Iterator[None]:
    """Work on one sample: whatever it raises becomes that sample's BadSample, with its type.

    UserError passes, since it is about the run, and so do KeyboardInterrupt and its like.
    """
    try:
        yield
    except (BadSample, UserError):
        raise
    except Exception as error:
        raise BadSample(name, f"{type(error).__name__}: {error}") from error
