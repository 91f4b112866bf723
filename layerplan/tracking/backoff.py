"""How long to leave a thing alone that failed: twice as long each time, and not all at the same moment."""

from __future__ import annotations

import random
import time


class Backoff:
    """Counts failures in a row and says how long to wait still."""

    def __init__(self) -> None:
        self.failures = 0
        self._failed_at = 0.0
        self._jitter = 1.0

    def fail(self) -> None:
        """Notes a failure."""
        self.failures += 1
        self._failed_at = time.monotonic()
        self._jitter = random.uniform(0.5, 1.0)

    def succeed(self) -> None:
        """Forgets the failures."""
        self.failures = 0

    def left_s(self, longest_s: float) -> float:
        """Seconds to wait still: 1, 2, 4, ... after the last failure, at most `longest_s`, each less up to half."""
        if not self.failures:
            return 0.0
        wait = min(longest_s, 2.0 ** min(self.failures - 1, 16)) * self._jitter
        return max(0.0, self._failed_at + wait - time.monotonic())
