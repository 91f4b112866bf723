"""Which trials may still win, given the losses so far: the rule by which a profile-guided search leaves trials out.

Trials with the same side, ends and learning rate lie on one curve of loss over boundary. Three assumptions, each of which a
grid can refute, spare the rest of it:

1. A curve has one valley. Tested boundaries whose loss lies within `margin` of the curve's lowest hold the valley, and it
   ends at the next tested boundary on either side of them: no boundary further out may win.
2. Between two tested boundaries a curve falls no further than it fell from one tested boundary to the next nearest the
   valley. A curve whose lowest loss less that fall is more than `margin` above the lowest of all may not win.
3. Seeds move a loss by less than `margin` from one trial to another of the same seed: further seeds are for the trials whose
   first one lies within `margin` of the lowest.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from layerplan.sweep.space import Point

Losses = Mapping[str, float]
"""By the trial's name."""


def list_possible(points: Sequence[Point], losses: Losses, margin: float) -> list[Point]:
    """The untested trials that may still win, in the order given.

    Args:
        points: The space, in the order in which trials are wanted; the first seed in it decides about the others.
        losses: What the trials that ended came to; infinite for one that failed, which says nothing of others.
        margin: Nats a token that decide nothing.
    """
    if not points:
        return []
    first = points[0].seed
    curves = _read_curves(points, losses, first)
    best = min((loss for curve in curves.values() for loss in curve.values()), default=math.inf)
    possible = []
    for point in points:
        curve = curves[point.setting]
        if point.name in losses:
            continue
        if point.seed == first:
            wins = _may_win(point.boundary, curve, best, margin)
        else:
            wins = curve.get(point.boundary, math.inf) <= best + margin
        if wins:
            possible.append(point)
    return possible


def _read_curves(points: Sequence[Point], losses: Losses, seed: int) -> dict[tuple[object, ...], dict[int, float]]:
    curves: dict[tuple[object, ...], dict[int, float]] = {point.setting: {} for point in points}
    for point in points:
        if point.seed == seed and math.isfinite(losses.get(point.name, math.inf)):
            curves[point.setting][point.boundary] = losses[point.name]
    return curves


def _may_win(boundary: int, curve: Mapping[int, float], best: float, margin: float) -> bool:
    if len(curve) < 2:
        return True
    lowest = min(curve.values())
    valley = [tested for tested, loss in curve.items() if loss <= lowest + margin]
    left, right = _next_below(curve, min(valley)), _next_above(curve, max(valley))
    if (left is not None and boundary < left) or (right is not None and boundary > right):
        return False
    beside = [curve[edge] - lowest for edge in (left, right) if edge is not None]
    return lowest - max(beside, default=0.0) <= best + margin


def _next_below(boundaries: Collection[int], value: int) -> int | None:
    return max((each for each in boundaries if each < value), default=None)


def _next_above(boundaries: Collection[int], value: int) -> int | None:
    return min((each for each in boundaries if each > value), default=None)
