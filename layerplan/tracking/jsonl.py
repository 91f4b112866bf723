"""`metrics.jsonl`: one line per logged step, readable without any service."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from pathlib import Path
from typing import Any

from layerplan.artifacts import read_lines, write_lines
from layerplan.redaction import redact_text
from layerplan.tracking.journal import Journal, Line

ROLLED_BACK = "rolled_back"
"""Event that names steps whose lines were dropped because the steps were trained again."""
NOT_VALUES = ("run", "step", "time", "event", "message", "first", "last")


class EventLog:
    """Appends events of a run from a process that logs nothing else."""

    def __init__(self, path: Path, namespace: str) -> None:
        self._journal = Journal(path)
        self._namespace = namespace

    def log_event(self, name: str, step: int, message: str) -> None:
        """Appends one line with the event."""
        self._append(step, event=name, message=redact_text(message))

    def _append(self, step: int, **values: Any) -> None:
        self._journal.append({"run": self._namespace, "step": step, **values})


class JsonlSink(EventLog):
    """Appends lines `{"run": ..., "step": ..., name: value, "time": ...}`; those of steps that did not last are dropped."""

    def __init__(self, path: Path, namespace: str, start_step: int) -> None:
        super().__init__(path, namespace)
        self._path = path
        self._drop(start_step, with_events=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Appends one line."""
        self._append(step, **metrics)

    def drop_after(self, step: int) -> None:
        """Drops the numbers of later steps, which are trained again; what happened in them stays."""
        self._drop(step, with_events=False)

    def close(self) -> None:
        """Nothing is buffered."""

    def _drop(self, step: int, *, with_events: bool) -> None:
        lines = read_lines(self._path)
        is_lost = [self._is_lost(line, step, with_events=with_events) for line in lines]
        lost, kept = list(compress(lines, is_lost)), [line for line, gone in zip(lines, is_lost) if not gone]
        if not lost:
            return
        write_lines(self._path, kept)
        steps = sorted(line["step"] for line in lost if "event" not in line)
        if steps:
            words = f"steps {steps[0]} to {steps[-1]} did not last; training went on from step {step}"
            self._append(step, event=ROLLED_BACK, message=words, first=steps[0], last=steps[-1])

    def _is_lost(self, line: Line, step: int, *, with_events: bool) -> bool:
        if line.get("run") != self._namespace or line.get("step", 0) <= step:
            return False
        return "event" not in line or (with_events and line["event"] != ROLLED_BACK)


def values_of(line: Line) -> dict[str, float]:
    """The numbers of a line by their names; none for an event."""
    return {} if "event" in line else {key: value for key, value in line.items() if key not in NOT_VALUES}
