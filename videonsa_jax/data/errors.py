"""What is wrong with one sample, as opposed to wrong with the program."""

import contextlib
from collections.abc import Iterator
from typing import Literal

from videonsa_jax.errors import UserError

Stage = Literal["outline", "read"]  # of a file: a look at its header, or decoding it


class BadSample(Exception):
    """A sample that cannot be used; its text is one line that names the file and the reason."""

    def __init__(self, file: str, reason: str, lost_in: Stage | None = None):
        """`lost_in`: where the file hung or killed its decoder; None: it did neither."""
        super().__init__(file, reason, lost_in)
        self.file = file
        self.reason = " ".join(reason.split())
        self.lost_in = lost_in

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


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
