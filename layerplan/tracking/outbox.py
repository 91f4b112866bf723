"""What the driver wants in the lineage, written into the run folder first; a process beside the run carries it on.

`<run>/tracking/` holds it: `lineage.jsonl` (runs opened and closed, parameters, tags, numbers of the stages, files that
are followed), `artifacts.jsonl` (files to copy), one file of events per stage that another process notes, and `sent.json`,
how far the store has got. Nothing here needs the store.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from layerplan.artifacts import read_lines, write_text
from layerplan.redaction import redact_text, redact_values
from layerplan.run_folder import (
    ARTIFACTS_NAME,
    EVENTS_PREFIX,
    LINEAGE_NAME,
    MLFLOW_RUN_NAME,
    MLFLOW_RUNS_NAME,
    REFUSED_NAME,
    SENDER_LOCK_NAME,
    SENT_NAME,
    UID_NAME,
    RunFolder,
)
from layerplan.tracking.journal import Journal

PARENT = "parent"
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Dataset:
    """What a run trains on."""

    name: str
    digest: str
    """Hash of its content."""
    source: str
    """Folder or address."""
    profile: Mapping[str, Any] = field(default_factory=dict)
    """Its sizes and counts."""


@dataclass(frozen=True)
class TrackingFolder:
    """Paths of a run's outbox."""

    run_dir: Path

    @property
    def root(self) -> Path:
        """The folder."""
        return RunFolder(self.run_dir).tracking

    @property
    def lineage(self) -> Path:
        """Everything but artifacts, in order."""
        return self.root / LINEAGE_NAME

    @property
    def artifacts(self) -> Path:
        """Files to copy; apart, since a full disk of the artifact store must not hold up the rest."""
        return self.root / ARTIFACTS_NAME

    @property
    def sent(self) -> Path:
        """How far the store has got."""
        return self.root / SENT_NAME

    @property
    def refused(self) -> Path:
        """What the store will never take, with its words."""
        return self.root / REFUSED_NAME

    @property
    def lock(self) -> Path:
        """Held by the one process that sends."""
        return self.root / SENDER_LOCK_NAME

    @property
    def run_ids(self) -> Path:
        """MLflow's run id of each stage."""
        return self.run_dir / MLFLOW_RUNS_NAME

    def read_uid(self) -> str:
        """A name of this folder that no other has; made once."""
        path = self.root / UID_NAME
        if not path.exists():
            write_text(path, uuid.uuid4().hex)
        return path.read_text(encoding="utf-8")

    @property
    def place(self) -> Path:
        """Where MLflow has the parent run: its experiment and its id."""
        return self.root / MLFLOW_RUN_NAME

    def events_of(self, stage: str) -> Path:
        """What another process than the driver notes about a stage."""
        return self.root / f"{EVENTS_PREFIX}{stage}.jsonl"

    def list_followed(self) -> list[FollowedFile]:
        """The metrics files and their runs, each once."""
        entries = [line for line in read_lines(self.lineage) if line.get("do") == "follow"]
        return list(dict.fromkeys(FollowedFile(line["file"], line["namespace"], line["run"]) for line in entries))


@dataclass(frozen=True)
class FollowedFile:
    """Lines of one namespace in a file that grows, which belong to one stage."""

    file: str
    """Relative to the run folder."""
    namespace: str
    stage: str

    @property
    def key(self) -> str:
        """Name of its position."""
        return f"{self.file}#{self.namespace}"


class Outbox:
    """The driver's two journals."""

    def __init__(self, folder: TrackingFolder) -> None:
        self.folder = folder
        self._lineage = Journal(folder.lineage)
        self._artifacts = Journal(folder.artifacts)
        self._followed = set(folder.list_followed())

    def note(self, stage: str, do: str, **values: Any) -> None:
        """Notes something for a stage's run."""
        self._lineage.append({"run": stage, "do": do, **values})

    def note_artifact(self, stage: str, path: Path, into: str | None) -> None:
        """Notes a file to copy; the copy is of what the file holds when it is sent."""
        self._artifacts.append({"run": stage, "path": self._relative(path), "into": into})

    def follow(self, stage: str, path: Path, namespace: str) -> None:
        """Notes that a file's lines belong to a stage, once."""
        followed = FollowedFile(self._relative(path), namespace, stage)
        if followed not in self._followed:
            self._followed.add(followed)
            self.note(stage, "follow", file=followed.file, namespace=namespace)

    def _relative(self, path: Path) -> str:
        path, root = path.resolve(), self.folder.run_dir.resolve()
        return str(path.relative_to(root) if path.is_relative_to(root) else path)


class OutboxTracker:
    """One run of the lineage, kept in the outbox."""

    def __init__(
        self,
        outbox: Outbox,
        stage: str,
        name: str,
        close: Callable[[], None] | None = None,
        parent: str = PARENT,
    ) -> None:
        self._outbox = outbox
        self._stage = stage
        self._close = close
        outbox.note(stage, "open", name=name, parent=parent)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Records parameters; the store keeps the first value of each."""
        self._outbox.note(self._stage, "params", values={key: redact_text(str(value)) for key, value in params.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records numbers of one step."""
        self._outbox.note(
            self._stage, "metrics", step=step, values={key: float(value) for key, value in metrics.items()}
        )

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Has a file copied into the run's artifacts."""
        self._outbox.note_artifact(self._stage, path, folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags."""
        self._outbox.note(self._stage, "tags", values={key: redact_text(str(value)) for key, value in tags.items()})

    def log_dataset(self, dataset: Dataset) -> None:
        """Records what the run trains on."""
        self._outbox.note(self._stage, "dataset", values=redact_values(asdict(dataset)))

    def child(self, name: str) -> OutboxTracker:
        """Opens a run that is nested in this one."""
        return OutboxTracker(self._outbox, name, name, parent=self._stage)

    def follow(self, path: Path, namespace: str) -> None:
        """Has the lines that a worker appends to a file sent as metrics of this run."""
        self._outbox.follow(self._stage, path, namespace)

    def events_path(self) -> Path:
        """File to which another process appends what happens to this run."""
        path = self._outbox.folder.events_of(self._stage)
        self._outbox.follow(self._stage, path, self._stage)
        return path

    def close(self, status: Status = "FINISHED") -> None:
        """Ends the run; the parent's end waits a while for the store."""
        self._outbox.note(self._stage, "close", status=status)
        if self._close is not None:
            self._close()
