"""What a profile-guided search would have run of a study's grid, and what it would have found: replayed from finished arms.

The search is the sweep's own; only trainings are looked up. Orders drawn at random go through the same rule, which says
how much of the saving is the measurement's and how much the rule's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerplan.config.plan import PlanOptions
from layerplan.config.search import ProfileSearchConfig
from layerplan.plan.layer_measurement import LayerMeasurement
from layerplan.sweep.choosers import ProfileChooser, order_points
from layerplan.sweep.rating import rate_by_measurement
from layerplan.sweep.space import Point

NUM_ORDERS = 200
"""Orders drawn at random."""
FREEZES = {"shallow": "deep", "deep": "shallow"}
"""The side that trains, to the one that freezes."""


@dataclass(frozen=True)
class Course:
    """Of one search."""

    flops: float
    """Of the trials it ran, as a share of the grid's."""
    regret: float
    """Mean loss over all seeds of the plan it found, less the lowest of the grid, nats."""


class Grid:
    """The finished grid of a study as trials of a sweep."""

    def __init__(self, arms: Sequence[Mapping[str, Any]], text: str = "target") -> None:
        self.points: list[Point] = []
        self._losses: dict[str, float] = {}
        self._flops: dict[str, float] = {}
        self._means: dict[tuple[int, str], list[float]] = {}
        for arm in arms:
            side, _, boundary = arm["label"].partition(" of ")
            place = (int(boundary), FREEZES[side])
            point = Point(*place, PlanOptions(), 0.0, arm["seed"], f"{arm['label']} {arm['seed']}")
            loss = float(np.mean(arm["final"][text]))
            self.points.append(point)
            self._losses[point.name], self._flops[point.name] = loss, arm["flops_share"]
            self._means.setdefault(place, []).append(loss)

    def replay(self, rate: Callable[[Point], float], margin: float) -> Course:
        """Runs the search until it has nothing left to try."""
        chooser = ProfileChooser(
            order_points(self.points, rate), ProfileSearchConfig(type="profile", by="spectrum", margin=margin)
        )
        tried: list[Point] = []
        while (point := chooser.choose()) is not None:
            chooser.tell(point, self._losses[point.name])
            tried.append(point)
        found: dict[tuple[int, str], list[float]] = {}
        for point in tried:
            found.setdefault((point.boundary, point.freeze), []).append(self._losses[point.name])
        most = max(map(len, found.values()))
        chosen = min(
            (place for place, losses in found.items() if len(losses) == most), key=lambda at: np.mean(found[at])
        )
        means = {place: float(np.mean(losses)) for place, losses in self._means.items()}
        spent = sum(self._flops[point.name] for point in tried) / sum(self._flops.values())
        return Course(spent, means[chosen] - min(means.values()))


def render_replay(
    arms: Sequence[Mapping[str, Any]], measurements: Sequence[LayerMeasurement], margin: float = 0.01
) -> str:
    """Table of the searches by every measurement, and of orders drawn at random."""
    grid = Grid([arm for arm in arms if arm["group"] == "grid"])
    lines = ["| order | FLOPs of the grid's | regret of what it found, nats |", "|---|---:|---:|"]
    for each in measurements:
        course = grid.replay(rate_by_measurement(each), margin)
        lines.append(f"| {each.name.replace('_', ' ')} | {course.flops:.0%} | {course.regret:.4f} |")
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(NUM_ORDERS):
        ratings = {(point.boundary, point.freeze): float(rng.random()) for point in grid.points}
        drawn.append(grid.replay(lambda point, ratings=ratings: ratings[point.boundary, point.freeze], margin))
    flops, regrets = (np.array([getattr(course, name) for course in drawn]) for name in ("flops", "regret"))
    low, high = np.quantile(flops, [0.025, 0.975])
    lines.append(
        f"| {NUM_ORDERS} at random, mean (95 %) | {flops.mean():.0%} ({low:.0%} to {high:.0%}) | {regrets.mean():.4f}, at most"
        f" {regrets.max():.4f} |"
    )
    return "\n".join(lines)
