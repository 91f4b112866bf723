"""Which trial comes next: one small interface, and the ways of going through a space behind it."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from layerplan.config.search import (
    GridSearchConfig,
    OptunaSearchConfig,
    ProfileSearchConfig,
    RandomSearchConfig,
    SearchConfig,
)
from layerplan.sweep.space import Point
from layerplan.sweep.still_wins import list_possible


class Chooser(Protocol):
    """Gives out trials one by one, none twice, and is told what they came to."""

    @property
    def most(self) -> int:
        """Trials it gives out at most."""
        ...

    def choose(self) -> Point | None:
        """The next trial; None when, as far as is known now, there is none."""
        ...

    def tell(self, point: Point, loss: float) -> None:
        """Takes the loss of a trial that ended, also of one that an earlier job ran; infinite for one that failed."""
        ...


class ListChooser:
    """The trials of a list, in its order."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._points = list(points)
        self._given: set[str] = set()

    @property
    def most(self) -> int:
        """All of them."""
        return len(self._points)

    def choose(self) -> Point | None:
        """The first that was neither given out nor told."""
        point = next((each for each in self._points if each.name not in self._given), None)
        if point is not None:
            self._given.add(point.name)
        return point

    def tell(self, point: Point, loss: float) -> None:
        """Only leaves it out from now on."""
        self._given.add(point.name)


class ProfileChooser:
    """The trials in the order of a measurement, as long as they may still win."""

    def __init__(self, points: Sequence[Point], config: ProfileSearchConfig) -> None:
        self._points = list(points)
        self._margin = config.margin
        self._losses: dict[str, float] = {}
        self._given: set[str] = set()

    @property
    def most(self) -> int:
        """The whole space, when every trial may win to the end."""
        return len(self._points)

    def choose(self) -> Point | None:
        """The first by the measurement that may still win."""
        possible = list_possible(self._points, self._losses, self._margin)
        point = next((each for each in possible if each.name not in self._given), None)
        if point is not None:
            self._given.add(point.name)
        return point

    def tell(self, point: Point, loss: float) -> None:
        """Takes it into account from now on."""
        self._given.add(point.name)
        self._losses[point.name] = loss


def make_chooser(
    config: SearchConfig,
    points: Sequence[Point],
    rate: Callable[[Point], float] | None = None,
    begun: Collection[str] = (),
) -> Chooser:
    """The chooser a config asks for.

    Args:
        config: The search.
        points: The space.
        rate: How much a measurement speaks for a trial, for `profile`.
        begun: Names of trials that an earlier job began and did not end; suggestions begin with them.
    """
    match config:
        case GridSearchConfig():
            return ListChooser(points)
        case RandomSearchConfig():
            return ListChooser(draw_points(points, config))
        case OptunaSearchConfig():
            from layerplan.sweep.optuna_chooser import OptunaChooser

            return OptunaChooser(points, config, begun)
        case ProfileSearchConfig():
            assert rate is not None, "a measurement is read before trials are put in its order"
            return ProfileChooser(order_points(points, rate), config)


def draw_points(points: Sequence[Point], config: RandomSearchConfig) -> list[Point]:
    """The drawn trials; the more are asked for, the more follow the same ones."""
    order = sorted(points, key=lambda point: random.Random(f"{config.seed} {point.name}").random())
    return order[: config.num_trials]


def order_points(points: Sequence[Point], rate: Callable[[Point], float]) -> list[Point]:
    """Seed by seed, within one by the measurement, the space's own order among equals."""
    seeds = list(dict.fromkeys(point.seed for point in points))
    return sorted(points, key=lambda point: (seeds.index(point.seed), -rate(point)))
