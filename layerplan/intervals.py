"""A difference with its interval, written one way wherever it is shown."""

from __future__ import annotations


def show_difference(difference: float, interval: tuple[float, float], decimals: int) -> str:
    """`-0.0097 [95 %: -0.0213, -0.0062]`: both ends, since an interval need not lie evenly around its difference.

    Args:
        difference: What was found.
        interval: Ends of its 95 % interval.
        decimals: Digits after the point, of all three.
    """
    low, high = interval
    return f"{difference:+.{decimals}f} [95 %: {low:+.{decimals}f}, {high:+.{decimals}f}]"
