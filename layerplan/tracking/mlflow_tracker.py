"""The lineage in MLflow: one parent run per run folder, one nested run per stage.

The run folder remembers its MLflow run ids, so a killed and resubmitted job continues the same runs. The client API
is used throughout: it needs no global active run, and a worker can log to a run the driver opened.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Experiment, LifecycleStage, Metric, Param
from mlflow.exceptions import MlflowException

from layerplan.errors import TrackingError, first_line
from layerplan.tracking.sink import MlflowSinkFactory, SinkFactory
from layerplan.tracking.tracker import Status

RUNS_NAME = "mlflow_runs.json"
MAX_PARAM_CHARS = 6000
FLUSH_EVERY_S = 5.0

for _name in ("mlflow.store.db.utils", "alembic"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # making a new database is not news


def open_mlflow_run(uri: str, experiment: str, run_dir: Path, run_name: str) -> MlflowTracker:
    """Opens or continues the parent run of a run folder.

    Raises:
        TrackingError: When the store cannot be opened, or the experiment was deleted in it.
    """
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            location = (run_dir.parent / "mlartifacts").as_uri() if uri.startswith("sqlite") else None
            experiment_id = client.create_experiment(experiment, artifact_location=location)
        else:
            _check_active(found, uri)
            experiment_id = found.experiment_id
        book = _RunBook(run_dir / RUNS_NAME)
        run_id = _open_run(client, book, experiment_id, run_name, "parent", {})
    except TrackingError:
        raise
    except Exception as error:
        first = first_line(error)
        raise TrackingError(f"tracking.uri={uri}: cannot be opened ({first})") from error
    return MlflowTracker(client, uri, experiment_id, run_id, book)


def _check_active(experiment: Experiment, uri: str) -> None:
    """Refuses an experiment in MLflow's trash: it takes no run, its name is taken, and it may lie there on purpose."""
    if experiment.lifecycle_stage == LifecycleStage.DELETED:
        raise TrackingError(
            f"tracking.experiment={experiment.name}: was deleted in {uri}; restore it with `MLFLOW_TRACKING_URI={uri} mlflow"
            f" experiments restore --experiment-id {experiment.experiment_id}`, or set tracking.experiment to another name"
        )


class MlflowTracker:
    """One MLflow run."""

    def __init__(self, client: mlflow.MlflowClient, uri: str, experiment_id: str, run_id: str, book: _RunBook) -> None:
        self._client = client
        self._uri = uri
        self._experiment_id = experiment_id
        self.run_id = run_id
        self._book = book

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Records parameters that are not recorded yet; MLflow refuses to change one."""
        known = self._client.get_run(self.run_id).data.params
        new = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in params.items() if key not in known]
        for start in range(0, len(new), 100):
            self._client.log_batch(self.run_id, params=new[start : start + 100])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records metrics of one step."""
        now = int(time.time() * 1000)
        values = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=values)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copies a file into the run's artifacts."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags."""
        for key, value in tags.items():
            self._client.set_tag(self.run_id, key, value)

    def child(self, name: str) -> MlflowTracker:
        """Opens the nested run of a stage."""
        tags = {"mlflow.parentRunId": self.run_id, "layerplan.stage": name}
        run_id = _open_run(self._client, self._book, self._experiment_id, name, name, tags)
        return MlflowTracker(self._client, self._uri, self._experiment_id, run_id, self._book)

    def make_sink_factory(self) -> SinkFactory | None:
        """A picklable factory: only the address and the run id travel."""
        return MlflowSinkFactory(self._uri, self.run_id)

    def close(self, status: Status = "FINISHED") -> None:
        """Ends the run."""
        self._client.set_terminated(self.run_id, status=status)


class MlflowSink:
    """Buffers a worker's metrics and writes them in batches, so that a step never waits on the store.

    MLflow keeps every point ever logged; points that an earlier attempt wrote are therefore not written a second time.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self._run_id = run_id
        self._buffer: list[Metric] = []
        self._flushed = time.monotonic()
        self._written: dict[str, int] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Buffers the metrics of one step."""
        now = int(time.time() * 1000)
        self._buffer += [
            Metric(key, float(value), now, step) for key, value in metrics.items() if step > self._newest_step(key)
        ]
        if time.monotonic() - self._flushed > FLUSH_EVERY_S:
            self._flush()

    def log_event(self, name: str, step: int, message: str) -> None:
        """Keeps the event as a tag."""
        self._client.set_tag(self._run_id, f"event.{name}.{step}", message[:MAX_PARAM_CHARS])

    def close(self) -> None:
        """Writes what is buffered."""
        self._flush()

    def _newest_step(self, key: str) -> int:
        """The newest step the store already has for a metric; asked once, at the start of an attempt."""
        if key not in self._written:
            history = self._client.get_metric_history(self._run_id, key)
            self._written[key] = max((point.step for point in history), default=-1)
        return self._written[key]

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        while self._buffer:
            batch, self._buffer = self._buffer[:500], self._buffer[500:]
            self._client.log_batch(self._run_id, metrics=batch)


class _RunBook:
    """The run folder's memory of its MLflow run ids."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, key: str) -> str | None:
        if not self._path.exists():
            return None
        value = json.loads(self._path.read_text(encoding="utf-8")).get(key)
        return str(value) if value is not None else None

    def put(self, key: str, run_id: str) -> None:
        known = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({**known, key: run_id}, indent=2) + "\n", encoding="utf-8")
        partial.replace(self._path)


def _open_run(
    client: mlflow.MlflowClient, book: _RunBook, experiment_id: str, name: str, key: str, tags: Mapping[str, str]
) -> str:
    known = book.get(key)
    if known is not None:
        try:
            client.update_run(known, status="RUNNING")
            return known
        except MlflowException:
            pass  # the store is another one; the folder starts a new lineage there
    run_id: str = client.create_run(experiment_id, run_name=name, tags=dict(tags)).info.run_id
    book.put(key, run_id)
    return run_id
