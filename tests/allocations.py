"""Bytes PyTorch allocates on a CPU, counted by its own profiler: exact, whatever else the machine does."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def count_peak_bytes(work: Callable[[], object]) -> int:
    """Largest sum of living allocations that `work` made."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    result = recorded.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((event.start_ns(), event.nbytes()) for event in result.events() if event.name() == "[memory]")
    living = peak = 0
    for _, num_bytes in events:
        living += num_bytes
        peak = max(peak, living)
    return peak
