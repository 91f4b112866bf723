"""A small protocol for the lineage of a run: parameters, metrics by step, events, artifacts, nested stages.

Everything is written into the run folder and carried to the store from there, so that no call waits for it or fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from layerplan.config.tracking import TrackingConfig
from layerplan.tracking.jsonl import JsonlSink
from layerplan.tracking.outbox import Dataset, Status

logger = logging.getLogger(__name__)

NOTE_TAG = "mlflow.note.content"
"""What a run's page shows as its description, in Markdown."""
RUN_ID = "{run_id}"
"""Stands in a description for the store's id of the run, which is not known when it is written."""


class Tracker(Protocol):
    """One run of the lineage."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Records settings; a value that was recorded before stays."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records numbers of one step."""

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keeps a file."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags, replacing earlier values."""

    def log_dataset(self, dataset: Dataset) -> None:
        """Records what the run trains on."""

    def child(self, name: str) -> Tracker:
        """Opens the nested run of a stage; the same name continues the same run."""

    def follow(self, path: Path, namespace: str) -> None:
        """Takes the lines of a metrics file, under a namespace, as this run's; they are read while they are written."""

    def events_path(self) -> Path | None:
        """File to which another process appends what happens to this run; None when nothing is kept."""

    def close(self, status: Status = "FINISHED") -> None:
        """Ends the run."""


class NoopTracker:
    """Keeps nothing."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Does nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Does nothing."""

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Does nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Does nothing."""

    def log_dataset(self, dataset: Dataset) -> None:
        """Does nothing."""

    def child(self, name: str) -> Tracker:
        """Returns itself."""
        return self

    def follow(self, path: Path, namespace: str) -> None:
        """Does nothing."""

    def events_path(self) -> Path | None:
        """Has none."""
        return None

    def close(self, status: Status = "FINISHED") -> None:
        """Does nothing."""


def status_of(error: BaseException) -> Status:
    """How a run ended that something ended: by a fault, or because it was told to stop."""
    return "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"


def open_tracker(
    config: TrackingConfig, run_dir: Path, run_name: str, report: Callable[[str], None] = logger.info
) -> Tracker:
    """Opens the run's tracker; a run folder that was tracked before continues its run.

    Args:
        config: The config's tracking section.
        run_dir: The run's folder.
        run_name: Name of the parent run.
        report: Takes a line about the store: that it does not answer, that it does again, what has not arrived.

    Raises:
        TrackingError: When `tracking.required` is set and the store does not take the run.
    """
    if config.backend != "mlflow":
        return NoopTracker()
    from layerplan.tracking.background import open_outbox

    return open_outbox(config, run_dir, run_name, report)


class RunSinkFactory:
    """Makes a worker's sink, the run's `metrics.jsonl`. Travels by pickle, and no address travels with it."""

    def __init__(self, jsonl: Path, namespace: str, tracker: Tracker) -> None:
        self._jsonl = jsonl
        self._namespace = namespace
        tracker.follow(jsonl, namespace)

    def __call__(self, start_step: int) -> JsonlSink:
        """Opens the sink; lines of steps after `start_step` belong to a lost attempt and are dropped."""
        return JsonlSink(self._jsonl, self._namespace, start_step)
