"""How far a loop is, and how long it will take: a bar on a terminal, plain lines in a log."""

import sys
import time
from typing import Literal, TextIO

from tqdm import tqdm

LOG_INTERVAL = 10.0  # seconds between two lines of a log


class Progress:
    """Counts finished items, or bytes, out of `total`."""

    def __init__(
        self,
        label: str,
        total: int,
        *,
        done: int = 0,
        unit: Literal["items", "bytes"] = "items",
        stream: TextIO | None = None,
    ):
        """`done` items were finished by an earlier run; they do not enter the speed."""
        self._label, self._total, self._done = label, total, done
        self._is_bytes = unit == "bytes"
        self._stream = sys.stderr if stream is None else stream
        self._first = done
        self._started = self._reported = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            scale = {"unit": "B", "unit_scale": True} if self._is_bytes else {}
            self._bar = tqdm(desc=label, total=total, initial=done, file=self._stream, **scale)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()

    def advance(self, items: int, note: str = "") -> None:
        """Some items more are finished; `note` is what is known of them so far."""
        self._done += items
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(items)
        elif now - self._reported >= LOG_INTERVAL or self._done >= self._total:
            self._reported = now
            self._stream.write(self._line(now - self._started, note) + "\n")
            self._stream.flush()

    def _line(self, seconds: float, note: str) -> str:
        left = seconds / max(self._done - self._first, 1) * (self._total - self._done)
        minutes, rest = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        done, total = (self._amount(n) for n in (self._done, self._total))
        line = f"{self._label}  {done}/{total}  ETA {hours}:{minutes:02}:{rest:02}"
        return f"{line}  {note}" if note else line

    def _amount(self, count: int) -> str:
        return tqdm.format_sizeof(count, "B") if self._is_bytes else str(count)
