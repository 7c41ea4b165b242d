"""A folder that is either complete or visibly not."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from videonsa_jax.errors import UserError, describe_file_error

SUFFIX = ".incomplete"
MARKER = ".incomplete"  # a file in the unfinished folder, locked by the process that fills it


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields the folder `path.incomplete`, renamed to `path` once the block ends without error.

    After an error or a kill it stays, and the next attempt begins it anew.

    Raises:
      UserError: `path` exists, another process is filling it, the disk is full, or another error
        of the file system.
    """
    path = pathlib.Path(path).absolute()
    if os.path.lexists(path):
        raise UserError(f"{path} already exists; choose another destination or remove it")
    work = path.with_name(path.name + SUFFIX)
    try:
        with _claimed(work):
            yield work
        (work / MARKER).unlink()
        work.rename(path)
    except OSError as error:
        what = describe_file_error(error, work)
        raise UserError(f"{what}; {work} is incomplete; running again starts over") from error


@contextlib.contextmanager
def _claimed(work: pathlib.Path) -> Iterator[None]:
    """An empty folder, with a marker that this process has locked."""
    work.parent.mkdir(parents=True, exist_ok=True)
    if work.exists() and any(work.iterdir()):
        if not (work / MARKER).is_file():
            raise UserError(f"{work} was not made by a conversion; remove it")
        with _locked(work):
            shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    with _locked(work):
        yield


@contextlib.contextmanager
def _locked(work: pathlib.Path) -> Iterator[None]:
    with (work / MARKER).open("w") as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing {work}; wait for it") from error
        yield
