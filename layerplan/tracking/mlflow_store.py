"""The lineage in MLflow: one parent run per run folder, one nested run per stage.

The run folder remembers its MLflow run ids, so that a resubmitted job continues the same runs; they are made when the
store first answers. The client API is used throughout: it needs no global active run. Every call that could go on behind
our back is made synchronously, whatever `MLFLOW_ENABLE_ASYNC_LOGGING` says: what it returned from counts as arrived.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param
from mlflow.exceptions import MlflowException

from layerplan.artifacts import write_json
from layerplan.errors import TrackingError, first_line
from layerplan.redaction import redact_text, redact_uri
from layerplan.run_folder import MLFLOW_ARTIFACTS_NAME
from layerplan.tracking.outbox import PARENT, TrackingFolder
from layerplan.tracking.tracker import NOTE_TAG, RUN_ID

MAX_PARAM_CHARS, MAX_TAG_CHARS = 6000, 5000
"""MLflow's limits of values; a server of 2.9 refuses longer tags, one of 2.22 does not."""
MAX_NAME_CHARS, MAX_DIGEST_CHARS = 500, 36
"""MLflow's limits of a dataset."""
UID_TAG = "layerplan.uid"
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
"""Without it some releases take an experiment for one of GenAI traces, and show that it has none."""
GUESSED_KINDS = ("", "no_inferred_type")
GONE, WRONG = "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"

for _name in ("mlflow.store.db.utils", "alembic"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)  # it warns of every attempt, with the address


class RefusedError(Exception):
    """The store answers and will never take this."""


class RunMissingError(Exception):
    """The store does not know a stage's run: it is another store, or the run was removed for good."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage)
        self.stage = stage


class NotOpenedError(Exception):
    """A stage's run was not made yet."""


@dataclass(frozen=True)
class Point:
    """One number of a metric."""

    key: str
    value: float
    time: int
    step: int

    @property
    def identity(self) -> tuple[str, int, float | str]:
        """What makes two points the same; the store keeps an infinity as the largest float."""
        if math.isnan(self.value):
            return self.key, self.step, "nan"
        largest = sys.float_info.max
        return self.key, self.step, min(max(self.value, -largest), largest)


class MlflowStore:
    """MLflow at one address, as one run folder uses it."""

    def __init__(self, uri: str, experiment: str, folder: TrackingFolder) -> None:
        self._uri = uri
        self._experiment = experiment
        self._artifacts = (folder.run_dir.parent / MLFLOW_ARTIFACTS_NAME).as_uri() if uri.startswith("sqlite") else None
        self._place = folder.place
        self._uid = folder.read_uid()
        self._book = RunBook(folder.run_ids)
        self._client: Any = None
        self._experiment_id = ""

    def open(self) -> None:
        """Reaches the store and finds or makes the experiment; does nothing when that was done.

        Raises:
            TrackingError: When the experiment was deleted.
        """
        if self._client is not None:
            return
        client = mlflow.MlflowClient(tracking_uri=self._uri)
        found = client.get_experiment_by_name(self._experiment)
        if found is None:
            self._experiment_id = client.create_experiment(self._experiment, self._artifacts, tags={KIND_TAG: KIND})
        else:
            self._experiment_id = found.experiment_id
            self._check_experiment(found)
            _set_kind(client, found)
        self._client = client

    def open_run(self, stage: str, name: str, time: int, parent: str = PARENT) -> None:
        """Continues the stage's run, or makes it, nested in the run of another stage."""
        known = self._book.get(stage)
        if known is not None:
            with self._about(stage):
                self._client.update_run(known, status="RUNNING")
                if stage == PARENT:
                    self._note_place(self._client.get_run(known))
            return
        tags = {} if stage == PARENT else {"mlflow.parentRunId": self._run_id(parent), "layerplan.stage": stage}
        tags[UID_TAG] = f"{self._uid}/{stage}"
        # a server may have carried out a request whose answer never came
        made = self._client.search_runs([self._experiment_id], f"tags.`{UID_TAG}` = '{tags[UID_TAG]}'", max_results=1)
        run = (
            made[0] if made else self._client.create_run(self._experiment_id, start_time=time, run_name=name, tags=tags)
        )
        self._book.put(stage, run.info.run_id)
        if stage == PARENT:
            self._note_place(run)

    def has_run(self, stage: str) -> bool:
        """Whether the stage's run was made."""
        return self._book.get(stage) is not None

    def forget_run(self, stage: str) -> None:
        """Leaves a run that is gone to be made anew; without the parent every stage is, in a store that is opened again."""
        self._book.remove(stage)
        self._client = None

    def log_points(self, stage: str, points: Sequence[Point]) -> None:
        """Records numbers."""
        metrics = [Metric(point.key, point.value, point.time, point.step) for point in points]
        with self._about(stage):
            self._client.log_batch(self._run_id(stage), metrics=metrics, synchronous=True)

    def find_points(self, stage: str, points: Sequence[Point]) -> set[tuple[str, int, float | str]]:
        """Identities of the points the store has at the keys and steps of these."""
        first, run_id = min(point.step for point in points), self._run_id(stage)
        known: set[tuple[str, int, float | str]] = set()
        for key in {point.key for point in points}:
            with suppress(RefusedError), self._about(stage):  # a name that is not allowed has no point
                history = self._client.get_metric_history(run_id, key)
                known |= {Point(key, each.value, 0, each.step).identity for each in history if each.step >= first}
        return known

    def log_params(self, stage: str, params: Mapping[str, str]) -> None:
        """Records parameters that are not recorded yet; MLflow refuses to change one."""
        with self._about(stage):
            known = self._client.get_run(self._run_id(stage)).data.params
            new = [Param(key, value[:MAX_PARAM_CHARS]) for key, value in params.items() if key not in known]
            for start in range(0, len(new), 100):
                self._client.log_batch(self._run_id(stage), params=new[start : start + 100], synchronous=True)

    def set_tag(self, stage: str, key: str, value: str) -> None:
        """Sets a tag; a description learns the run's id."""
        with self._about(stage):
            run_id = self._run_id(stage)
            value = value.replace(RUN_ID, run_id) if key == NOTE_TAG else value
            self._client.set_tag(run_id, key, value[:MAX_TAG_CHARS], synchronous=True)

    def log_dataset(self, stage: str, values: Mapping[str, Any]) -> None:
        """Records what the run trains on; the store keeps one that it has already."""
        source = str(values["source"])
        dataset = Dataset(
            name=str(values["name"])[:MAX_NAME_CHARS],
            digest=str(values["digest"])[:MAX_DIGEST_CHARS],
            source_type=source.partition("://")[0] if "://" in source else "local",
            source=json.dumps({"uri": source}),
            profile=json.dumps(values["profile"]),
        )
        with self._about(stage):
            tags = [InputTag("mlflow.data.context", "training")]
            self._client.log_inputs(self._run_id(stage), [DatasetInput(dataset, tags)])

    def log_artifact(self, stage: str, path: Path, into: str | None) -> None:
        """Copies a file into the run's artifacts."""
        with self._about(stage):
            self._client.log_artifact(self._run_id(stage), str(path), into)

    def close_run(self, stage: str, status: str, time: int) -> None:
        """Ends the run."""
        with self._about(stage):
            self._client.set_terminated(self._run_id(stage), status=status, end_time=time)

    def _note_place(self, run: Any) -> None:
        place = {"experiment_id": run.info.experiment_id, "run_id": run.info.run_id}
        write_json(self._place, place)

    def _run_id(self, stage: str) -> str:
        run_id = self._book.get(stage)
        if run_id is None:
            raise NotOpenedError(stage)
        return run_id

    @contextmanager
    def _about(self, stage: str) -> Iterator[None]:
        """Tells a fault of what is sent from one of the run, and both from one of the store."""
        try:
            yield
        except MlflowException as error:
            if error.error_code not in (GONE, WRONG):
                raise
            self._check_run(stage)
            if error.error_code == GONE:
                raise
            raise RefusedError(redact_text(first_line(error), self._uri)) from error

    def _check_run(self, stage: str) -> None:
        try:
            run = self._client.get_run(self._run_id(stage))
        except MlflowException as error:
            if error.error_code == GONE:
                raise RunMissingError(stage) from error
            raise
        if run.info.lifecycle_stage != LifecycleStage.ACTIVE:
            self._check_experiment(self._client.get_experiment(run.info.experiment_id))
            advice = self._advise(f"runs restore --run-id {run.info.run_id}")
            raise TrackingError(
                f"{redact_uri(self._uri)}: the run of stage {stage!r} was deleted; restore it with {advice}"
            )

    def _check_experiment(self, experiment: Any) -> None:
        """Refuses an experiment in MLflow's trash: it takes no run, its name is taken, and it may lie there on purpose."""
        if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
            advice = self._advise(f"experiments restore --experiment-id {experiment.experiment_id}")
            raise TrackingError(
                f"tracking.experiment={self._experiment}: was deleted in {redact_uri(self._uri)}; restore it with {advice},"
                " or set tracking.experiment to another name"
            )

    def _advise(self, command: str) -> str:
        return f"`MLFLOW_TRACKING_URI={redact_uri(self._uri)} mlflow {command}`"


def _set_kind(client: Any, experiment: Any) -> None:
    """Says what the experiment is, in place of MLflow's guess; a person's choice stays, as does that of who may not."""
    kind = experiment.tags.get(KIND_TAG, "")
    if kind in GUESSED_KINDS or kind.endswith("_inferred"):
        with suppress(MlflowException):
            client.set_experiment_tag(experiment.experiment_id, KIND_TAG, KIND)


class RunBook:
    """The run folder's memory of its MLflow run ids."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, stage: str) -> str | None:
        """The stage's run id, or None."""
        value = self._read().get(stage)
        return str(value) if value is not None else None

    def put(self, stage: str, run_id: str) -> None:
        """Remembers a run id."""
        self._write({**self._read(), stage: run_id})

    def remove(self, stage: str) -> None:
        """Forgets a stage, and with the parent all of them."""
        self._write({} if stage == PARENT else {key: value for key, value in self._read().items() if key != stage})

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _write(self, known: Mapping[str, Any]) -> None:
        write_json(self._path, known)
