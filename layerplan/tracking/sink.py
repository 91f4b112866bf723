"""Where a worker's numbers go: the worker-side half of tracking."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol


class Sink(Protocol):
    """Takes the metrics and events of one training run."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the metrics of one step."""

    def log_event(self, name: str, step: int, message: str) -> None:
        """Takes something that happened."""

    def close(self) -> None:
        """Flushes what is buffered."""


SinkFactory = Callable[[int], Sink]


class MlflowSinkFactory:
    """Opens MLflow in the process that logs. Ray Train takes it to every worker, and most of them never call it."""

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri = uri
        self._run_id = run_id

    def __call__(self, start_step: int) -> Sink:
        """A sink of the run."""
        from layerplan.tracking.mlflow_tracker import MlflowSink

        return MlflowSink(self._uri, self._run_id)


class CompositeSink:
    """Sends everything to several sinks."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Passes the metrics on."""
        for sink in self._sinks:
            sink.log_metrics(metrics, step)

    def log_event(self, name: str, step: int, message: str) -> None:
        """Passes the event on."""
        for sink in self._sinks:
            sink.log_event(name, step, message)

    def close(self) -> None:
        """Closes every sink."""
        for sink in self._sinks:
            sink.close()
