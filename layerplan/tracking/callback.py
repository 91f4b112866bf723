"""What Ray Train's controller sees: committed checkpoints and failures, written to the lineage once."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from layerplan.run_folder import EVENTS_PREFIX
from layerplan.tracking.jsonl import EventLog
from layerplan.tracking.tracker import Tracker


class LineageCallback(UserCallback):
    """Notes each committed checkpoint and each failure of a worker group. Runs in the controller process."""

    def __init__(self, tracker: Tracker) -> None:
        self._path = tracker.events_path()

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Notes a checkpoint as the newest complete one."""
        if checkpoint is not None:
            self._note("checkpoint", int(metrics[0].get("step", 0)), str(checkpoint.path))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Notes a failure with the failed workers' own words."""
        message = "; ".join(f"worker {rank}: {error}" for rank, error in worker_exceptions.items())
        self._note("worker_failure", 0, message)

    def _note(self, name: str, step: int, message: str) -> None:
        if self._path is not None:
            EventLog(self._path, self._path.stem.removeprefix(EVENTS_PREFIX)).log_event(name, step, message)
