"""`metrics.jsonl`: one line per logged step, readable without any service."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonlSink:
    """Appends lines `{"run": ..., "step": ..., name: value}`; a resume drops the lines of the attempt that was lost."""

    def __init__(self, path: Path, namespace: str, start_step: int) -> None:
        self._path = path
        self._namespace = namespace
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [
            line for line in read_metrics(path) if line.get("run") != namespace or line.get("step", 0) <= start_step
        ]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)

    def kept_metrics(self) -> list[tuple[int, dict[str, float]]]:
        """Step and values of this run's lines that are no events, in order."""
        own = [line for line in read_metrics(self._path) if line.get("run") == self._namespace and "event" not in line]
        return [
            (line["step"], {key: value for key, value in line.items() if key not in ("run", "step")}) for line in own
        ]

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Appends one line."""
        self._append({"run": self._namespace, "step": step, **metrics})

    def log_event(self, name: str, step: int, message: str) -> None:
        """Appends one line with the event."""
        self._append({"run": self._namespace, "step": step, "event": name, "message": message})

    def close(self) -> None:
        """Nothing is buffered."""

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; a half-written last line is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
