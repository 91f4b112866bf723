"""Optuna's suggestions, through Ray Tune's own searcher, over a space in which every combination is a trial."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

from layerplan.config.search import OptunaSearchConfig
from layerplan.sweep.space import Point

LOSS = "loss"
REPEATS = 20
"""Suggestions of trials that were run already, after which one is drawn in their place."""


class OptunaChooser:
    """Trials that the sampler suggests; one that it suggests again is answered from what is known, and costs nothing."""

    def __init__(self, points: Sequence[Point], config: OptunaSearchConfig, begun: Collection[str] = ()) -> None:
        from ray.tune.search.optuna import OptunaSearch

        self._points = {_locate(point, points): point for point in points}
        self._num_trials = min(config.num_trials, len(points))
        self._space = _make_space(points)
        self._search = OptunaSearch(self._space, metric=LOSS, mode="min", seed=config.seed) if self._space else None
        self._rng = random.Random(config.seed)
        self._losses: dict[str, float] = {}
        self._given: dict[str, str] = {}
        """Names of trials that were given out, and the sampler's names for those that it suggested."""
        self._begun = [point for point in points if point.name in begun]
        self._asked = 0

    @property
    def most(self) -> int:
        """As many as are asked for, or the space has."""
        return self._num_trials

    def choose(self) -> Point | None:
        """The next that an earlier job began and did not end, then the next suggestion that is new."""
        begun = next((each for each in self._begun if each.name not in self._given | self._losses), None)
        if begun is not None:
            self._given[begun.name] = ""
            return begun
        if len(self._given.keys() | self._losses.keys()) >= self._num_trials:
            return None
        for _ in range(REPEATS if self._search is not None else 0):
            asked, point = self._suggest()
            if point.name not in self._given and point.name not in self._losses:
                self._given[point.name] = asked
                return point
            self._answer(asked, self._losses.get(point.name))
        return self._draw()

    def tell(self, point: Point, loss: float) -> None:
        """Gives the sampler the loss, whether it asked for it or not."""
        self._losses[point.name] = loss
        asked = self._given.get(point.name)
        if asked:
            self._answer(asked, loss)
        elif self._search is not None:
            place = next(place for place, each in self._points.items() if each.name == point.name)
            values = {name: value for name, value in place if name in self._space}
            self._search.add_evaluated_point(values, loss)

    def _suggest(self) -> tuple[str, Point]:
        assert self._search is not None
        self._asked += 1
        asked = f"suggestion_{self._asked}"
        values = self._search.suggest(asked)
        assert values is not None, "the sampler always has a suggestion"
        fixed = {name: value for place in list(self._points)[:1] for name, value in place}
        return asked, self._points[tuple((name, values.get(name, fixed[name])) for name in fixed)]

    def _answer(self, asked: str, loss: float | None) -> None:
        """What is running is no result; the sampler is told of a failure of its own, and asked again."""
        assert self._search is not None
        self._search.on_trial_complete(asked, None if loss is None else {LOSS: loss}, error=loss is None)

    def _draw(self) -> Point | None:
        left = [each for each in self._points.values() if each.name not in self._given | self._losses]
        if not left:
            return None
        point = self._rng.choice(left)
        self._given[point.name] = ""
        return point


_DIMENSIONS: dict[str, Callable[[Point], Any]] = {
    "boundary": lambda point: point.boundary,
    "freeze": lambda point: point.freeze,
    "ends": lambda point: point.ends.model_dump_json(),
    "learning_rate": lambda point: point.learning_rate,
    "seed": lambda point: point.seed,
}


def _list_values(points: Sequence[Point]) -> dict[str, list[Any]]:
    """The values of every dimension; those with an order in it, so that neighbours are near each other."""
    found = {name: list(dict.fromkeys(map(read, points))) for name, read in _DIMENSIONS.items()}
    return found | {name: sorted(found[name]) for name in ("boundary", "learning_rate")}


def _locate(point: Point, points: Sequence[Point]) -> tuple[tuple[str, int], ...]:
    values = _list_values(points)
    return tuple((name, values[name].index(read(point))) for name, read in _DIMENSIONS.items())


def _make_space(points: Sequence[Point]) -> dict[str, Any]:
    """A distribution of places for every dimension that has a choice."""
    import optuna

    return {
        name: optuna.distributions.IntDistribution(0, len(values) - 1)
        if name in ("boundary", "learning_rate")
        else optuna.distributions.CategoricalDistribution(list(range(len(values))))
        for name, values in _list_values(points).items()
        if len(values) > 1
    }
