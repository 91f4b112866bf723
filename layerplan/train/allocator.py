"""The C library's allocator, in a worker that trains on a CPU."""

from __future__ import annotations

import ctypes
from contextlib import suppress

from torch import nn

LARGE_BYTES = 4 * 2**20
"""Smaller ones cost a step more page faults than they give back: 1 MiB made one of 12 layers a third slower."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of glibc's `mallopt`."""


def use_memory_well(model: nn.Module, *, is_sharded: bool) -> None:
    """Sharded models are trained where memory is short; others keep what they have."""
    if is_sharded:
        keep_memory_low(model)
    else:
        keep_large_blocks()


def keep_memory_low(model: nn.Module) -> None:
    """Gives back what building left, and from here on the holes that each forward and backward pass leaves.

    Smaller blocks than `LARGE_BYTES` lie in heaps, in which every gathered layer leaves some holes: two workers of 56 layers
    held 0.5 GiB more than they used at the end of a step, 0.3 GiB where holes are given back twice a micro-batch.
    """
    give_back_holes()
    model.register_forward_pre_hook(lambda *_: give_back_holes())
    model.register_forward_hook(lambda *_: give_back_holes())


def give_back_holes() -> None:
    """Pages of freed blocks go back to the system; where the C library is not glibc, nothing happens."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_large_blocks() -> None:
    """Large blocks stay with the process when they are freed, for the next step to use.

    A step frees and asks for the same blocks as the one before. Those above 32 MiB, such as logits, would go back to the system
    each time and come anew, page by page, which costs a tenth of a step where matrix products are fast (AMX). What the process
    holds at its peak does not change. Where the C library is not glibc, nothing happens.
    """
    _set_thresholds(2**31 - 1)


def return_large_blocks() -> None:
    """Large blocks lie apart from here on, and go back to the system when they are freed.

    Left to itself, glibc puts blocks of up to 32 MiB into its heaps once one of their size was freed. A sharded layer is
    gathered and let go in blocks of such sizes, which then leave holes: a worker held up to twice what it used. Where the C
    library is another, nothing happens.
    """
    _set_thresholds(LARGE_BYTES)


def _set_thresholds(size: int) -> None:
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, size)
        libc.mallopt(_TRIM_THRESHOLD, size)
