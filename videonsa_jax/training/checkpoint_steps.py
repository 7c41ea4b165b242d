"""The steps of a folder of checkpoints: which are complete, and what is said of the others.

A folder that was copied in part lacks files, or has empty ones: it is passed over. A file that is
there but not what was written is damage, of which the user decides.
"""

import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import sys
import urllib.parse
from collections.abc import Iterator
from typing import Any

import jax
import tensorstore as ts

from videonsa_jax.errors import UserError, describe_file_error

METADATA = "_CHECKPOINT_METADATA"  # Orbax's, of a step
JSON_ITEMS = ("config", "data")
NEEDED = ("params", "config")  # of weights that belong to no run, too
INDEX = "manifest.ocdbt"  # of an item of arrays: where the parts of each lie
_NOT_OF_FILES = (UserError, MemoryError, jax.errors.JaxRuntimeError)


def numbers(folder: pathlib.Path) -> list[int]:
    """Of all steps that have a folder, the newest first."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted((int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name)), reverse=True)


def newest(folder: pathlib.Path) -> int | None:
    """The newest complete step, None if there is none; one line names those passed over.

    Raises:
      UserError: the folder cannot be read, or a file of the newest complete step is damaged.
    """
    passed, found = [], None
    with reading(folder):
        steps = numbers(folder)
    for step in steps:
        with reading(folder, step):
            lack = missing(folder / str(step))
        if lack is None:
            found = step
            break
        passed.append(f"step {step} is incomplete ({lack})")
    if passed:
        use = "no earlier one is complete" if found is None else f"step {found} is used"
        _say(f"{folder}: {', '.join(passed)}: left alone; {use}")
    return found


def missing(step: pathlib.Path) -> str | None:
    """What the folder of a step lacks, None if it is complete; reads no arrays.

    Raises:
      OSError: of the file system.
      ValueError: a file is damaged.
    """
    if not (step / METADATA).is_file():
        return f"{METADATA} is missing" if any(step.iterdir()) else "it is empty"
    if empty := [file for file in sorted(step.rglob("*")) if _is_empty(file)]:
        return f"{empty[0].relative_to(step)} has 0 bytes"
    stored = _read_json(step / METADATA)
    if stored.get("commit_timestamp_nsecs") is None:
        return "its save did not end"
    for item in sorted({*NEEDED, *stored.get("item_handlers", ())}):
        names = ("metadata",) if item in JSON_ITEMS else ("_METADATA", INDEX)
        for name in names:
            if not (step / item / name).is_file():
                return f"{item}/{name} is missing"
        for name in ("metadata", "_METADATA", "_sharding", "array_metadatas/process_*"):
            for file in (step / item).glob(name):
                _read_json(file)
        if item not in JSON_ITEMS and (lack := _missing_part(step / item)):
            return f"{item}/{lack} is missing"
    return None


def is_complete(step: pathlib.Path) -> bool:
    """Whether nothing is missing and no damage is seen."""
    try:
        return missing(step) is None
    except (OSError, ValueError):
        return False


def remaining(folder: pathlib.Path, before: int | None = None) -> str:
    """Which step is usable, in words: the newest complete one, or that before a damaged one."""
    if not folder.is_dir():
        return "no step is left"
    try:
        steps = (x for x in numbers(folder) if before is None or x < before)
        step = next((x for x in steps if is_complete(folder / str(x))), None)
    except OSError as error:
        return f"no step can be read ({_reason(error, folder)})"
    if step is None:
        return "no step is complete" if before is None else "no step before it is complete"
    if before is None:
        return f"step {step} is complete: the same command goes on from it"
    return f"step {step} is complete: rename or remove {folder / str(before)} to use it"


@functools.cache
def quiet() -> None:
    """Called by programs: Orbax and TensorStore print tracebacks of what they raise anyway."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not record.exc_info)
    hook = sys.unraisablehook

    def unraisable(error):
        code = getattr(error.object, "cr_code", None)  # of Orbax's coroutines
        of_orbax = code is not None and "orbax" in code.co_filename
        if not of_orbax and str(error.exc_value) != "Event loop is closed":
            hook(error)

    sys.unraisablehook = unraisable


@contextlib.contextmanager
def reading(folder: pathlib.Path, step: int | None = None) -> Iterator[None]:
    """Around all that reads a step of a folder, or looks for its steps.

    Raises:
      UserError: it is damaged or cannot be read; the line says which step before it is complete.
    """
    try:
        yield
    except _NOT_OF_FILES:
        raise
    except Exception as error:  # Orbax raises all types, Exception itself among them
        reason = _reason(error, folder)
        if step is None:
            raise UserError(f"{folder} cannot be read: {reason}") from error
        raise UserError(
            f"{folder}: step {step} is damaged or cannot be read: {reason}; "
            f"{remaining(folder, before=step)}"
        ) from error


@contextlib.contextmanager
def writing(folder: pathlib.Path, step: int) -> Iterator[None]:
    """Around all that writes a step of a folder, or waits for it to be written.

    Raises:
      UserError: it could not be written; the line says which step is complete.
    """
    try:
        yield
    except _NOT_OF_FILES:
        raise
    except Exception as error:  # see above
        raise UserError(
            f"{folder}: step {step} could not be saved: {_reason(error, folder)}; "
            f"{remaining(folder)}"
        ) from error


def _is_empty(file: pathlib.Path) -> bool:
    return file.is_file() and file.stat().st_size == 0


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is not what was written")
    return value


def _missing_part(item: pathlib.Path) -> str | None:
    """A file that the index of an item refers to and that is not there.

    Raises:
      ValueError: the index is damaged, or a file is shorter than it says.
    """
    base = ts.KvStore.open({"driver": "file", "path": f"{item}/"}).result()
    root = _dump(base, item / INDEX)["versions"][-1]["root"]
    pending = [root["location"]] if "location" in root else []
    while pending:
        location = pending.pop()
        kind, below, name, offset, length = map(urllib.parse.unquote, location.split(":"))
        file = item / below / name
        if not file.is_file():
            return str(file.relative_to(item))
        have, need = file.stat().st_size, int(offset) + int(length)
        if have < need:
            raise ValueError(f"{file} has {have:,} of {need:,} bytes")
        if kind == "btreenode":
            entries = _dump(base, file, location)["entries"]
            places = (entry.get("location", entry.get("indirect_value")) for entry in entries)
            pending += [place for place in places if place is not None]
    return None


def _dump(base: ts.KvStore, file: pathlib.Path, location: str | None = None) -> dict[str, Any]:
    try:
        return ts.ocdbt.dump(base, location).result()
    except ValueError as error:
        raise ValueError(f"{file}: {_one_line(error)}") from error


def _reason(error: BaseException, folder: pathlib.Path) -> str:
    """The file and what is wrong with it; TensorStore says both in a text of many lines."""
    error = error.__cause__ if type(error) is Exception and error.__cause__ else error
    if isinstance(error, OSError) and error.errno is not None:
        return describe_file_error(error, folder)
    text = _one_line(error)
    if code := re.search(r"os_error_code='(\d+)'", text):
        file = max(re.findall(r'"(/[^"]+)"', text), key=len, default=None)
        return describe_file_error(OSError(int(code[1]), os.strerror(int(code[1])), file), folder)
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).split(" [source locations")[0]


@functools.cache  # a program opens a folder several times and says it once
def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
