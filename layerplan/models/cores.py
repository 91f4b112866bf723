"""How many cores one engine computes on: Ray gives a process one thread per CPU it reserves, so by default one."""

from __future__ import annotations

import os

import torch


def count_threads(asked: int | None, num_engines: int, num_cores: int) -> int:
    """Threads of one engine: what was asked for, else its share of the cores, at least one."""
    return asked or max(1, num_cores // num_engines)


def use_cores(num_threads: int) -> None:
    """Gives this process so many threads; must come before an engine binds its own."""
    torch.set_num_threads(num_threads)


def find_threads(asked: int | None, num_engines: int) -> int:
    """The same for the node this is called on."""
    return count_threads(asked, num_engines, len(os.sched_getaffinity(0)))
