"""Where a worker is in its training, as a value that ranks can be compared by, and the beat that carries it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

IN_STEP = ("waiting for rows", "forward and backward", "update")
"""Parts of a step, in their order; the limit holds in them. Loading, compiling, validating and saving take what they take."""
STARTING = "starting"
LOGGING = "logging"
Mark = Callable[[str, int], None]
"""Takes (part, step) as a part begins."""


@dataclass(frozen=True)
class Place:
    """A point of the training that a rank can be at; later ones are larger."""

    step: int
    """1-based step being taken; after it, the step just taken."""
    part: str
    is_first: bool = True
    """Whether the attempt has not finished a step yet: then it may be compiling."""

    @property
    def order(self) -> tuple[int, int]:
        """What tells which rank is behind."""
        return self.step, IN_STEP.index(self.part) if self.part in IN_STEP else len(IN_STEP)

    @property
    def is_limited(self) -> bool:
        """Whether it may take only so long."""
        return self.part in IN_STEP and not self.is_first

    def __str__(self) -> str:
        return f"{self.part}, step {self.step}"


@dataclass(frozen=True)
class Beat:
    """What one rank says of itself."""

    rank: int
    pid: int
    host: str
    node_id: str
    actor: Any
    """Handle of the worker."""
    count: int
    """Beats sent; grows as long as the process runs."""
    place: Place
    slowest_s: float
    """Slowest of the recent steps."""
    start_s: float
    """From the start of the process to that of its training function."""
    group: str = ""
    """Of the workers of one attempt, which are not always as many."""
    before_s: float = 0.0
    """Longest it was at the same part before, of parts outside steps; 0 when it never was."""
    first_s: float = 0.0
    """Median of the first steps but the very first; 0 before there are enough."""
    recent_s: float = 0.0
    """Median of the newest steps."""
    began: float = 0.0
    """When its training function began, seconds since the epoch."""
