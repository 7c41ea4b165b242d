"""Counts bad samples, lists each once in a file, and ends a run that has too many."""

import json
import logging
import math
import pathlib
from collections.abc import Iterable

from videonsa_jax.data.errors import BadSample
from videonsa_jax.errors import UserError

MIN_SEEN = 20  # samples before the fraction is judged
UNSEEN = 400  # so many samples to come are taken for good, lest early bad ones end a run by chance

log = logging.getLogger(__name__)


class Ledger:
    """The account of one process."""

    def __init__(self, path: str | pathlib.Path, max_bad_fraction: float, *, records: int):
        """`path`: JSONL, continued if it exists; `records`: of one pass over the source."""
        self._path, self._max_bad_fraction = pathlib.Path(path), max_bad_fraction
        self._records = max(records, 1)
        self._listed = _listed(self._path)
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
                f"{self._max_bad_fraction:g} allows; all are listed in {self._path}, the last is "
                f"{last}"
            )

    def _list(self, bad: BadSample) -> None:
        if (bad.file, bad.reason) in self._listed:
            return
        self._listed.add((bad.file, bad.reason))
        log.warning("skipped %s", bad)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"file": bad.file, "reason": bad.reason}) + "\n")


def _listed(path: pathlib.Path) -> set[tuple[str, str]]:
    """What is in the file; a last line that a killed run left unfinished is cut off."""
    if not path.is_file():
        return set()
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    rows = [json.loads(line) for line in whole.splitlines()]
    return {(row["file"], row["reason"]) for row in rows}
