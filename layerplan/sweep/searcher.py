"""A chooser as Ray Tune's search algorithm; what begins and ends is told in the driver, where the lineage is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray.tune.search.searcher import Searcher

from layerplan.sweep.choosers import Chooser
from layerplan.sweep.objective import LOSS, read_loss
from layerplan.sweep.space import Point

Report = dict[str, Any]


class TrialSearcher(Searcher):
    """Gives Ray Tune the chooser's trials, one by one.

    Args:
        chooser: Knows what comes next.
        ended: Trials that an earlier job ended, given out first, so that the scheduler knows what they reported.
        first: The chooser's first trial.
        on_begin: Called as a trial is given out.
        on_end: Called with a trial's last report; None when Ray Tune lost it.
    """

    def __init__(
        self,
        chooser: Chooser,
        ended: Sequence[Point],
        first: Point,
        on_begin: Callable[[Point], None],
        on_end: Callable[[Point, Report | None], None],
    ) -> None:
        super().__init__(metric=LOSS, mode="min")
        self._chooser = chooser
        self._ended = list(ended)
        self._first: Point | None = first
        self._on_begin = on_begin
        self._on_end = on_end
        self._running: dict[str, Point | None] = {}
        """None for a trial that only tells again what it told."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's name; nothing for now while others run, whose results may call for more."""
        if self._ended:
            self._running[trial_id] = None
            return {"trial": self._ended.pop(0).name, "has_ended": True}
        point, self._first = self._first or self._chooser.choose(), None
        if point is None:
            return None if self._running else Searcher.FINISHED
        self._running[trial_id] = point
        self._on_begin(point)
        return {"trial": point.name, "has_ended": False}

    def on_trial_complete(self, trial_id: str, result: Report | None = None, error: bool = False) -> None:
        """Tells the chooser what a trial came to."""
        point = self._running.pop(trial_id)
        if point is None:
            return
        self._chooser.tell(point, float("inf") if error or result is None else read_loss(result))
        self._on_end(point, None if error else result)

    def save(self, checkpoint_path: str) -> None:
        """Keeps nothing: a sweep that goes on reads what its trials left."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Has nothing to read."""

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune writes its settings down; the lineage stays in this process."""
        return {}
