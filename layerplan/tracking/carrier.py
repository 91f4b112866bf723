"""Carries a run's outbox to the store, in bounded pieces, each acknowledged before the next.

A piece that failed may have arrived all the same, and a stored position may be behind. So the store is asked which points
it has before any is sent after a start or a failure, until a piece is met of which it has none, and at steps that are
repeated after a return to a checkpoint: there a point that is computed again with the same value is not sent twice, and one
with another value follows at the same step with its later time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from layerplan.errors import first_line
from layerplan.redaction import redact_text
from layerplan.tracking.backoff import Backoff
from layerplan.tracking.journal import Journal, Line, LineReader, time_of
from layerplan.tracking.jsonl import ROLLED_BACK, values_of
from layerplan.tracking.mlflow_store import MlflowStore, NotOpenedError, Point, RefusedError, RunMissingError
from layerplan.tracking.outbox import PARENT, FollowedFile, TrackingFolder
from layerplan.tracking.position import ARTIFACTS, LINEAGE, Positions

MAX_POINTS = 1000
"""MLflow's limit of one call."""


class Source(Protocol):
    """One file's way to the store."""

    reader: LineReader
    doubtful: bool

    @property
    def key(self) -> str:
        """Name of its position."""

    def wants(self, line: Line) -> bool:
        """Whether a line is this source's."""

    def send(self, lines: Sequence[Line]) -> Iterator[int]:
        """Sends lines; yields the time of the last one that arrived, whenever some have."""


@dataclass
class Carried:
    """What one round came to."""

    lines: int = 0
    failures: list[Exception] = field(default_factory=list)
    waiting: bool = False
    """Whether a source failed before and is left alone for a while."""


class Carrier:
    """All sources of one run folder."""

    def __init__(
        self, folder: TrackingFolder, store: MlflowStore, on_progress: Callable[[], None] = lambda: None
    ) -> None:
        self._folder = folder
        self._store = store
        self._on_progress = on_progress
        self._backoffs: defaultdict[str, Backoff] = defaultdict(Backoff)
        self._positions = Positions.load(folder.sent)
        self._refused: Journal | None = None
        self._sources: dict[str, Source] = {
            LINEAGE: _Lineage(LineReader(folder.lineage), store, self._refuse),
            ARTIFACTS: _Artifacts(LineReader(folder.artifacts), store, self._refuse, folder.run_dir),
        }
        if not store.has_run(PARENT):
            self._positions = Positions()

    def carry(self, longest_wait_s: float = 0.0) -> Carried:
        """Sends at most one piece of each source; a source that fails does not hold up the others."""
        try:
            self._store.open()
        except Exception as error:
            return Carried(failures=[error])
        carried = Carried()
        for source in list(self._list_sources()):
            backoff = self._backoffs[source.key]
            if backoff.left_s(longest_wait_s):
                carried.waiting = True
                continue
            try:
                carried.lines += self._carry_one(source)
                backoff.succeed()
            except RunMissingError as missing:
                self._start_anew(missing.stage)
                return Carried(lines=1)
            except NotOpenedError:
                source.reader.forget()
            except Exception as error:
                source.reader.forget()
                source.doubtful = True
                backoff.fail()
                carried.failures.append(error)
        return carried

    def _list_sources(self) -> Iterator[Source]:
        yield self._sources[LINEAGE]
        for followed in self._folder.list_followed():
            if self._store.has_run(followed.stage):
                if followed.key not in self._sources:
                    reader = LineReader(self._folder.run_dir / followed.file)
                    self._sources[followed.key] = _Metrics(reader, self._store, self._refuse, followed, self._positions)
                yield self._sources[followed.key]
        yield self._sources[ARTIFACTS]

    def _carry_one(self, source: Source) -> int:
        after = self._positions.sent.get(source.key, 0)
        lines = source.reader.peek(lambda line: source.wants(line) and (time_of(line) > after or after == 0))
        if not lines:
            return 0
        for arrived in source.send(lines):
            self._positions.sent[source.key] = max(after, arrived)
            self._positions.save(self._folder.sent)
            self._on_progress()
        source.reader.advance()
        return len(lines)

    def _refuse(self, stage: str, what: str, reason: str) -> None:
        if self._refused is None:
            self._refused = Journal(self._folder.refused)
        self._refused.append({"run": stage, "what": what, "reason": redact_text(reason)})

    def _start_anew(self, stage: str) -> None:
        """The store lost a run: everything goes there again, and what it still has is not doubled."""
        self._store.forget_run(stage)
        self._positions.sent.clear()
        self._positions.save(self._folder.sent)
        for source in self._sources.values():
            source.reader.rewind()
            source.doubtful = True


@dataclass
class _Lineage:
    reader: LineReader
    store: MlflowStore
    refuse: Callable[[str, str, str], None]
    key: str = LINEAGE
    doubtful: bool = True

    def wants(self, line: Line) -> bool:
        return True

    def send(self, lines: Sequence[Line]) -> Iterator[int]:
        for (stage, do), group in groupby(lines, key=lambda line: (line["run"], line["do"])):
            entries = list(group)
            if do == "metrics":
                points = [point for line in entries for point in _list_points(line["values"], line)]
                _send_points(self.store, stage, points, self.refuse, ask=True)
            else:
                for line in entries:
                    self._send_one(stage, do, line)
            yield time_of(entries[-1])

    def _send_one(self, stage: str, do: str, line: Line) -> None:
        if do == "open":
            self.store.open_run(stage, line["name"], line["time"], parent=line.get("parent", PARENT))
        elif do == "close":
            self.store.close_run(stage, line["status"], line["time"])
        elif do == "params":
            items = list(line["values"].items())
            _split(items, lambda part: self.store.log_params(stage, dict(part)), self._refuse_item(stage, "parameter"))
        elif do == "tags":
            for item in line["values"].items():
                _split([item], lambda part: self.store.set_tag(stage, *part[0]), self._refuse_item(stage, "tag"))
        elif do == "dataset":
            item = (line["values"]["name"], line["values"])
            _split([item], lambda part: self.store.log_dataset(stage, part[0][1]), self._refuse_item(stage, "dataset"))

    def _refuse_item(self, stage: str, kind: str) -> Callable[[tuple[str, Any], str], None]:
        return lambda item, reason: self.refuse(stage, f"{kind} {item[0]}", reason)


@dataclass
class _Artifacts:
    reader: LineReader
    store: MlflowStore
    refuse: Callable[[str, str, str], None]
    run_dir: Path
    key: str = ARTIFACTS
    doubtful: bool = True

    def wants(self, line: Line) -> bool:
        return True

    def send(self, lines: Sequence[Line]) -> Iterator[int]:
        for line in lines:
            if (self.run_dir / line["path"]).is_file():
                _split([line], self._copy, self._refuse_line)
            else:
                self._refuse_line(line, "the file was removed before it could be sent")
            yield time_of(line)

    def _copy(self, lines: Sequence[Line]) -> None:
        for line in lines:
            self.store.log_artifact(line["run"], self.run_dir / line["path"], line["into"])

    def _refuse_line(self, line: Line, reason: str) -> None:
        self.refuse(line["run"], f"artifact {line['path']}", reason)


@dataclass
class _Metrics:
    reader: LineReader
    store: MlflowStore
    refuse: Callable[[str, str, str], None]
    followed: FollowedFile
    positions: Positions
    doubtful: bool = True

    @property
    def key(self) -> str:
        return self.followed.key

    def wants(self, line: Line) -> bool:
        return line.get("run") == self.followed.namespace

    def send(self, lines: Sequence[Line]) -> Iterator[int]:
        for is_event, group in groupby(lines, key=lambda line: "event" in line):
            entries = list(group)
            if is_event:
                for line in entries:
                    self._send_event(line)
            else:
                self._send_values([point for line in entries for point in _list_points(values_of(line), line)])
            yield max(map(time_of, entries))

    def _send_values(self, points: Sequence[Point]) -> None:
        until = self.positions.recheck.get(self.key, -1)
        for start in range(0, len(points), MAX_POINTS):
            part = points[start : start + MAX_POINTS]
            repeats = any(point.step <= until for point in part)
            known = _send_points(self.store, self.followed.stage, part, self.refuse, ask=self.doubtful or repeats)
            self.doubtful = self.doubtful and known > 0

    def _send_event(self, line: Line) -> None:
        name, step, stage = line["event"], line["step"], self.followed.stage
        tag, words = f"event.{name}.{step}", line["message"]
        if name == ROLLED_BACK:
            tag = f"{ROLLED_BACK}.{line['first']}_to_{line['last']}"
            words += f"; points of these steps from before {_describe_time(line['time'])} do not count"
            self.positions.recheck[self.key] = max(self.positions.recheck.get(self.key, -1), line["last"])
        _split(
            [tag],
            lambda part: self.store.set_tag(stage, part[0], words),
            lambda item, reason: self.refuse(stage, f"tag {item}", reason),
        )


def _send_points(
    store: MlflowStore, stage: str, points: Sequence[Point], refuse: Callable[[str, str, str], None], *, ask: bool
) -> int:
    """Sends points, asking first which are there already; returns how many are."""
    known = store.find_points(stage, points) if ask and points else set()
    new = [point for point in points if point.identity not in known]
    for start in range(0, len(new), MAX_POINTS):
        part = new[start : start + MAX_POINTS]
        refused = lambda point, reason: refuse(stage, f"metric {point.key} of step {point.step}", reason)  # noqa: E731
        _split(part, lambda part: store.log_points(stage, part), refused)
    return len(points) - len(new)


def _split(items: Sequence[Any], send: Callable[[Sequence[Any]], None], refuse: Callable[[Any, str], None]) -> None:
    """Sends items together, and in halves when the store refuses, until the refused one is found."""
    try:
        if items:
            send(items)
    except RefusedError as error:
        if len(items) == 1:
            refuse(items[0], first_line(error))
            return
        middle = len(items) // 2
        _split(items[:middle], send, refuse)
        _split(items[middle:], send, refuse)


def _list_points(values: dict[str, float], line: Line) -> list[Point]:
    when = time_of(line) or int(time.time() * 1000)
    return [Point(key, float(value), when, line["step"]) for key, value in values.items()]


def _describe_time(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(milliseconds / 1000))
