"""The C library's allocator, in a worker that trains on a CPU."""

from __future__ import annotations

import ctypes
from contextlib import suppress

LARGE_BYTES = 4 * 2**20
"""Smaller ones cost a step more page faults than they give back: 1 MiB made one of 12 layers a third slower."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of glibc's `mallopt`."""


def return_large_blocks() -> None:
    """Large blocks lie apart from here on, and go back to the system when they are freed.

    Left to itself, glibc puts blocks of up to 32 MiB into its heaps once one of their size was freed. A sharded layer is
    gathered and let go in blocks of such sizes, which then leave holes: a worker held up to twice what it used. Where the C
    library is another, nothing happens.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, LARGE_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, LARGE_BYTES)
