"""A small protocol for the lineage of a run: parameters, metrics by step, events, artifacts, nested stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from layerplan.config.tracking import TrackingConfig
from layerplan.tracking.jsonl import JsonlSink
from layerplan.tracking.sink import CompositeSink, Sink, SinkFactory

Status = Literal["FINISHED", "FAILED"]


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

    def child(self, name: str) -> Tracker:
        """Opens the nested run of a stage; the same name continues the same run."""

    def make_sink_factory(self) -> SinkFactory | None:
        """A picklable factory of this run's metric sink, for a worker."""

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

    def child(self, name: str) -> Tracker:
        """Returns itself."""
        return self

    def make_sink_factory(self) -> SinkFactory | None:
        """Has none."""
        return None

    def close(self, status: Status = "FINISHED") -> None:
        """Does nothing."""


def open_tracker(config: TrackingConfig, run_dir: Path, run_name: str) -> Tracker:
    """Opens the run's tracker; a run folder that was tracked before continues its run.

    Raises:
        TrackingError: When the store cannot be reached.
    """
    if config.backend != "mlflow":
        return NoopTracker()
    from layerplan.tracking.mlflow_tracker import open_mlflow_run

    uri = config.uri or f"sqlite:///{run_dir.parent / 'mlflow.db'}"
    return open_mlflow_run(uri, config.experiment, run_dir, run_name)


class RunSinkFactory:
    """Makes a worker's sink: `metrics.jsonl` of the run, and whatever the tracker adds. Travels by pickle."""

    def __init__(self, jsonl: Path | None, namespace: str, tracker: Tracker) -> None:
        self._jsonl = jsonl
        self._namespace = namespace
        self._factory: Callable[[int], Sink] | None = tracker.make_sink_factory()

    def __call__(self, start_step: int) -> Sink:
        """Opens the sinks; lines of steps after `start_step` belong to a lost attempt and are dropped.

        An attempt that was killed took its buffered points with it. The file has them all, so the kept lines go to the
        tracker's sink again, which writes only what it lacks.
        """
        sinks: list[Sink] = []
        tracked = self._factory(start_step) if self._factory is not None else None
        if self._jsonl is not None:
            jsonl = JsonlSink(self._jsonl, self._namespace, start_step)
            sinks.append(jsonl)
            if tracked is not None:
                for step, values in jsonl.kept_metrics():
                    tracked.log_metrics(values, step)
        if tracked is not None:
            sinks.append(tracked)
        return CompositeSink(sinks)
