"""The actor in which Ray Tune runs trials one after the other; its workers stay from trial to trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune

from layerplan.log import set_up_worker
from layerplan.ray_session import quiet_engines
from layerplan.sweep.group import TrainingGroup
from layerplan.sweep.objective import Course, Replay, Trial, make_request
from layerplan.train.request import TrainRequest


@dataclass(frozen=True)
class Shared:
    """What travels to the actors."""

    request: TrainRequest
    """What trials have in common; its `run_dir` is the sweep's folder."""
    trials: Mapping[str, Trial]


class TrialActor(tune.Trainable):
    """Trains the trial that its config names; Ray Tune gives it another one when that has ended or was stopped."""

    def setup(self, config: dict[str, Any], shared: Shared) -> None:
        """Begins the first trial; workers are started when a trial needs them."""
        set_up_worker()
        quiet_engines()
        self._shared = shared
        self._group: TrainingGroup | None = None
        self._begin(config)

    def step(self) -> dict[str, Any]:
        """Waits for the trial's next report."""
        return self._course.next()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Ends a trial that was stopped, and begins another with the same workers."""
        self._course.stop()
        self._begin(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Has nothing to add to what the training saves."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Has nothing to read: the training goes on from its own checkpoints."""

    def cleanup(self) -> None:
        """Ends the trial, and lets the workers go."""
        self._course.stop()
        if self._group is not None:
            self._group.close()

    def _begin(self, config: dict[str, Any]) -> None:
        trial = self._shared.trials[config["trial"]]
        request = make_request(self._shared.request, trial)
        self._course: Course | Replay = (
            Replay(request, trial.steps) if config["has_ended"] else Course(trial, request, self._train)
        )

    def _train(self, request: TrainRequest, report: Any) -> None:
        if self._group is None or not self._group.is_alive:
            self._group = TrainingGroup(request.config, self._shared.request.run_dir)
        self._group.train(request, report)
