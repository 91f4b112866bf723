"""One line from time to time while a model is scored."""

from __future__ import annotations

import time
from collections.abc import Callable

from layerplan.progress_line import ProgressLine


class ProgressLines:
    """Counts what is done and says from time to time how far that is.

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
        self._what, self._total, self._clock = what, total, clock
        self._line = ProgressLine(report, clock=clock)
        self._first, self._done = done, done
        self._started = clock()

    def add(self, count: int) -> None:
        """Counts so many more."""
        self._done += count
        if self._done < self._total:
            self._line.show(self._describe)

    def close(self) -> None:
        """Ends the display."""
        self._line.close()

    def _describe(self) -> str:
        left_s = (self._clock() - self._started) * (self._total - self._done) / max(self._done - self._first, 1)
        return f"{self._done:,} of {self._total:,} {self._what}, about {left_s:.0f} s to go"
