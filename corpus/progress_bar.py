"""How far long work on a corpus is: a bar in a terminal, elsewhere a line a minute.

All of it goes to stderr. A bar is drawn over itself with carriage returns, which would fill a file
or the log of a job with what was meant to disappear.
"""

import sys
import time

from tqdm import tqdm

from planner.layout import format_count, format_duration

SECONDS_BETWEEN_LINES = 60.0
SECONDS_BETWEEN_REDRAWINGS = 0.5
# What is counted: how a bar calls it, and how a line does
UNITS = dict(char="characters", token="tokens", B="bytes")


class ProgressBar:
    """Shows how much of a job is done, how fast it is, and the time left if the total is known.

    `total` and `done`, which an earlier process has done, are counted in `unit`, a key of UNITS.
    """

    def __init__(self, title: str, total: int | None = None, done: int = 0, unit: str = "char"):
        self.title = title
        self.total = total
        self.unit = unit
        self.done_before = done
        self.done = done
        self.documents = 0
        self.start = time.monotonic()
        self.latest_line = self.start
        # stderr is None in a process that was started without it.
        self.is_drawn = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(
            desc=title,
            total=total,
            initial=done,
            unit=unit,
            unit_scale=True,
            leave=False,
            mininterval=SECONDS_BETWEEN_REDRAWINGS,
            disable=not self.is_drawn,
        )

    def add(self, count: int, documents: int = 0) -> None:
        """Counts `count` characters, tokens or bytes more, which end `documents` documents."""
        self.done += count
        self.documents += documents
        if self.is_drawn:
            self.bar.set_postfix_str(self._documents_per_second(), refresh=False)
            self.bar.update(count)
            return
        now = time.monotonic()
        if now - self.latest_line >= SECONDS_BETWEEN_LINES:
            self.latest_line = now
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        """Such as "tokenizing: 45% of 1.23B characters, 2.10M characters/s, 5.2 minutes left"."""
        total = self.total
        if total is not None and self.done > total:
            total = None  # it was an estimate
        unit = UNITS[self.unit]
        speed = (self.done - self.done_before) / self._seconds()
        amount = f"{format_count(self.done)} {unit}"
        if total:
            amount = f"{self.done / total:.0%} of {format_count(total)} {unit}"
        parts = [amount, f"{format_count(speed)} {unit}/s"]
        if self.documents:
            parts.append(self._documents_per_second())
        if total and speed:
            parts.append(f"{format_duration((total - self.done) / speed)} left")
        return f"{self.title}: {', '.join(parts)}"

    def _documents_per_second(self) -> str:
        if not self.documents:
            return ""
        return f"{self.documents / self._seconds():,.0f} documents/s"

    def _seconds(self) -> float:
        return time.monotonic() - self.start

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
