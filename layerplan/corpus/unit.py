"""One piece of raw text, as it is listed and as it is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unit:
    """One stretch of one file, or one module, to read.

    Attributes:
        source: Index of the source in the config.
        path: File or module.
        format: Name of the reader.
        start: First byte of the stretch.
        stop: One past its last byte.
        skip: Documents (malformed ones too) at its beginning that were read before.
    """

    source: int
    path: str
    format: str
    start: int
    stop: int
    skip: int = 0

    @property
    def num_bytes(self) -> int:
        """Length of the stretch."""
        return self.stop - self.start
