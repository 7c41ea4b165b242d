"""Counts bad samples, lists each once in a file, and ends a run that has too many."""

import json
import logging
import math
import pathlib
from collections.abc import Iterable, Iterator

from videonsa_jax.data.decoder_pool import LostFiles
from videonsa_jax.data.errors import BadSample
from videonsa_jax.errors import UserError

MIN_SEEN = 20  # samples before the fraction is judged
UNSEEN = 400  # so many samples to come are taken for good, lest early bad ones end a run by chance

log = logging.getLogger(__name__)


class BadSampleLog:
    """The account of one process."""

    def __init__(self, path: str | pathlib.Path, max_bad_fraction: float, *, records: int):
        """`path`: JSONL, continued if it exists; `records`: of one pass over the source."""
        self.path, self._max_bad_fraction = pathlib.Path(path), max_bad_fraction
        self._records = max(records, 1)
        _cut_unfinished(self.path)
        self._listed = {(row["file"], row["reason"]) for row in _rows(self.path)}
        self.seen = 0  # samples, bad ones included; each pass over the source counts anew
        self.bad = 0

    def add(self, seen: int, bad: Iterable[BadSample]) -> None:
        """Counts `seen` samples, of which some are `bad`; each is listed when it is first met.

        Raises:
          UserError: too many are bad; all of them are in the file by then.
        """
        last = None
        self.seen += seen
        for last in bad:
            self.bad += 1
            self._list(last)
        passes = math.ceil(self.seen / self._records) * self._records
        judged = min(passes, self.seen + UNSEEN)
        if last and self.seen >= MIN_SEEN and self.bad > self._max_bad_fraction * judged:
            raise UserError(
                f"{self.bad} of {self.seen} samples are bad, more than data.max_bad_fraction="
                f"{self._max_bad_fraction:g} allows; all are listed in {self.path}, the last is "
                f"{last}"
            )

    def _list(self, bad: BadSample) -> None:
        if (bad.file, bad.reason) in self._listed:
            return
        self._listed.add((bad.file, bad.reason))
        log.warning("skipped %s", bad)
        row = {"file": bad.file, "reason": bad.reason}
        if bad.lost_in:
            row["lost_in"] = bad.lost_in
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def lost_files(path: str | pathlib.Path) -> LostFiles:
    """Files that hung or killed a decoder: of this list, and of the others in its folder.

    The other lists, bad_samples*.jsonl, are those of the run's other processes: all must agree on
    which samples get a place.

    Raises:
      UserError: a line is not one of a list.
    """
    path = pathlib.Path(path)
    paths = sorted({path, *path.parent.glob("bad_samples*.jsonl")})
    return {
        (row["file"], row["lost_in"]): row["reason"]
        for path in paths
        for row in _rows(path)
        if "lost_in" in row
    }


def _rows(path: pathlib.Path) -> Iterator[dict[str, str]]:
    """The whole lines; a last one without an end is unfinished."""
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["file"], row["reason"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}:{number}: not a line of a list of bad samples; delete the line"
            ) from error
        yield row


def _cut_unfinished(path: pathlib.Path) -> None:
    """Cuts off what a killed run left of a last line."""
    if path.is_file():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
