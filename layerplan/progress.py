"""One line from time to time while a model is scored."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY_S = 10.0


class ProgressLines:
    """Counts what is done and reports it, at most every `EVERY_S` seconds.

    Args:
        what: The things counted, in the plural.
        total: How many there are.
        report: Receives each line.
        done: How many were done before.
        clock: Seconds.
    """

    def __init__(
        self,
        what: str,
        total: int,
        report: Callable[[str], None],
        *,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._report, self._clock = what, total, report, clock
        self._first, self._done = done, done
        self._started = self._said = clock()

    def add(self, count: int) -> None:
        """Counts so many more."""
        self._done += count
        now = self._clock()
        if now - self._said < EVERY_S or self._done >= self._total:
            return
        self._said = now
        left_s = (now - self._started) * (self._total - self._done) / (self._done - self._first)
        self._report(f"{self._done:,} of {self._total:,} {self._what}, about {left_s:.0f} s to go")
