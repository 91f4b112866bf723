"""One line on how far long work is: redrawn in place on a terminal, elsewhere said at most once a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from layerplan.log import shows_progress

EVERY_S = 60.0
"""Between two lines where a line stays."""
REDRAW_S = 0.5


class ProgressLine:
    """Shows the newest state of one piece of work until it is closed.

    Args:
        report: Takes a line where none can be redrawn.
        clock: Seconds.
        redraws: Whether standard error is a terminal whose line can be redrawn; asked when left out.
    """

    def __init__(
        self,
        report: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        redraws: bool | None = None,
    ) -> None:
        self._report, self._clock = report, clock
        self._live = _Redrawn() if (shows_progress() and sys.stderr.isatty() if redraws is None else redraws) else None
        self._pause_s = EVERY_S if self._live is None else REDRAW_S
        self._said = clock()

    def show(self, describe: Callable[[], str]) -> None:
        """Shows what `describe` says when it is time; it is not asked otherwise."""
        now = self._clock()
        if now - self._said < self._pause_s:
            return
        self._said = now
        (self._report if self._live is None else self._live.show)(describe())

    def close(self) -> None:
        """Takes a redrawn line away."""
        if self._live is not None:
            self._live.close()


class _Redrawn:
    """The line on a terminal; what others write meanwhile scrolls above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.status import Status

        self._status = Status("", console=Console(stderr=True), refresh_per_second=2)
        self._is_shown = False

    def show(self, text: str) -> None:
        from rich.text import Text

        self._status.update(Text(text))
        if not self._is_shown:
            self._status.start()
            self._is_shown = True

    def close(self) -> None:
        self._status.stop()
