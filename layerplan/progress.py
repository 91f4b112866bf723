"""How far work is that many processes do, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable

from layerplan.progress_line import ProgressLine


class Pace:
    """How long the rest takes, by what came after the first results: those had to wait for a model to load.

    Args:
        total: How much there is, in any unit.
        done: How much was done before.
        clock: Seconds.
    """

    def __init__(self, total: float, *, done: float = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._before, self._clock = total, done, clock
        self._first: tuple[float, float] | None = None

    def note(self, done: float) -> None:
        """Takes the time when the first results are in."""
        if self._first is None and done > self._before:
            self._first = self._clock(), done

    def estimate_left_s(self, done: float) -> float | None:
        """Seconds until all is done; None before there are two results to measure between."""
        if self._first is None or done <= self._first[1]:
            return None
        began, first = self._first
        return (self._clock() - began) * (self._total - done) / (done - first)


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
        self._what, self._total, self._done = what, total, done
        self._line = ProgressLine(report, clock=clock)
        self._pace = Pace(total, done=done, clock=clock)

    def add(self, count: int) -> None:
        """Counts so many more."""
        self._done += count
        self._pace.note(self._done)
        if self._done < self._total:
            self._line.show(self._describe)

    def close(self) -> None:
        """Ends the display."""
        self._line.close()

    def _describe(self) -> str:
        left_s = self._pace.estimate_left_s(self._done)
        left = "" if left_s is None else f", about {left_s:.0f} s to go"
        return f"{self._done:,} of {self._total:,} {self._what}{left}"
