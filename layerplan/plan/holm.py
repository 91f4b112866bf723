"""Holm's correction: what is left of p when several were looked at."""

from __future__ import annotations

from collections.abc import Sequence


def correct_holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p-values that may be compared with alpha as they are."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
