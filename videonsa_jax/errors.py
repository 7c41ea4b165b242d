"""The errors that a user can mend; programs print them as one line, without a traceback."""

import contextlib
import errno
import pathlib
import shutil
from collections.abc import Callable, Iterator

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """Says in one line which value is wrong, what is allowed, and what to do."""


@contextlib.contextmanager
def file_errors(folder: str | pathlib.Path, what_is_left: Callable[[], str]) -> Iterator[None]:
    """Around work on a folder's files: a full disk, a vanished mount and the like become one line.

    Args:
      folder: named where the error names no file.
      what_is_left: asked after an error; the end of the line.

    Raises:
      UserError: the operating system raised an error.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not of the operating system
            raise
        raise UserError(f"{describe_file_error(error, folder)}; {what_is_left()}") from error


def describe_file_error(error: OSError, folder: str | pathlib.Path) -> str:
    """An error of the file system in one line, with the room that is left where that is why."""
    text = f"{error.filename or folder}: {error.strerror or error}"
    if error.errno in _NO_ROOM:
        with contextlib.suppress(OSError):
            text += f" ({shutil.disk_usage(folder).free:,} bytes are free)"
    return text
