"""How far the store has got with a run's outbox, and what is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from layerplan.artifacts import read_lines, write_json
from layerplan.tracking.journal import Line, time_of
from layerplan.tracking.jsonl import values_of
from layerplan.tracking.outbox import TrackingFolder

LINEAGE, ARTIFACTS = "lineage", "artifacts"


class Positions(BaseModel):
    """What the store has acknowledged; kept in `sent.json`."""

    sent: dict[str, int] = {}
    """Time of the newest line of each source that the store has, or will never take."""
    recheck: dict[str, int] = {}
    """Step up to which a source repeats steps, so that the store is asked which points it has."""

    @classmethod
    def load(cls, path: Path) -> Positions:
        """Reads the file; one that cannot be read counts as none, since the store is asked for what it has then."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError, ValueError):
            return cls()

    def save(self, path: Path) -> None:
        """Writes the file aside and moves it into place."""
        write_json(path, self.model_dump())


@dataclass(frozen=True)
class Backlog:
    """What the store has not got."""

    entries: int
    artifacts: int
    numbers: int
    """Metric values and events."""
    refused: int
    """Things the store will never take; they are in `refused.jsonl`."""

    @property
    def is_empty(self) -> bool:
        """Whether everything arrived that can."""
        return not (self.entries or self.artifacts or self.numbers)

    def describe(self) -> str:
        """What is left, in words."""
        parts = [(self.numbers, "metric value"), (self.entries, "lineage entry"), (self.artifacts, "artifact")]
        return ", ".join(f"{count:,} {_plural(word, count)}" for count, word in parts if count)


def count_backlog(run_dir: Path) -> Backlog:
    """Counts what a run folder holds beyond what was acknowledged."""
    folder = TrackingFolder(run_dir)
    sent = Positions.load(folder.sent).sent
    numbers = [
        len(values_of(line)) or 1
        for followed in folder.list_followed()
        for line in _newer(run_dir / followed.file, sent.get(followed.key, 0))
        if line.get("run") == followed.namespace
    ]
    return Backlog(
        entries=sum(1 for _ in _newer(folder.lineage, sent.get(LINEAGE, 0))),
        artifacts=sum(1 for _ in _newer(folder.artifacts, sent.get(ARTIFACTS, 0))),
        numbers=sum(numbers),
        refused=len(read_lines(folder.refused)),
    )


def _newer(path: Path, after: int) -> Iterator[Line]:
    return (line for line in read_lines(path) if time_of(line) > after)


def _plural(word: str, count: int) -> str:
    if count == 1:
        return word
    return f"{word.removesuffix('y')}ies" if word.endswith("y") else f"{word}s"
