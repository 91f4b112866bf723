"""What a run logs lies in its folder first: lines that are numbered, read once, and counted while they wait."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerplan.artifacts import read_lines
from layerplan.config.tracking import TrackingConfig
from layerplan.tracking import journal
from layerplan.tracking.background import BackgroundSender
from layerplan.tracking.journal import Journal, LineReader
from layerplan.tracking.jsonl import JsonlSink
from layerplan.tracking.position import count_backlog
from layerplan.tracking.probe import PROBE_S, probe
from layerplan.tracking.tracker import NoopTracker, RunSinkFactory, open_tracker
from tests.mlflow_server import make_sink, open_stage


def test_a_resume_drops_the_lines_of_the_attempt_that_was_lost_and_says_which(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    other = JsonlSink(path, "base_model", 0)
    other.log_metrics({"train/loss": 9.0}, 7)
    sink = JsonlSink(path, "train", 0)
    for step in (1, 2, 3, 4):
        sink.log_metrics({"train/loss": float(step)}, step)
    with path.open("a") as handle:
        handle.write('{"run": "train", "st')
    again = JsonlSink(path, "train", 2)
    again.log_metrics({"train/loss": 3.5}, 3)
    lines = read_lines(path)
    assert [(line["run"], line["step"], line.get("train/loss")) for line in lines] == [
        ("base_model", 7, 9.0),
        ("train", 1, 1.0),
        ("train", 2, 2.0),
        ("train", 2, None),
        ("train", 3, 3.5),
    ]
    assert (lines[3]["event"], lines[3]["first"], lines[3]["last"]) == ("rolled_back", 3, 4)
    JsonlSink(path, "train", 3)
    assert read_lines(path) == lines, "nothing was lost, nothing is written anew"
    JsonlSink(path, "train", 1)
    marks = [(line["first"], line["last"]) for line in read_lines(path) if line.get("event") == "rolled_back"]
    assert marks == [(3, 4), (2, 3)], "what was sent of lost steps stays marked"


def test_a_return_to_a_checkpoint_drops_the_numbers_and_keeps_what_happened(tmp_path: Path):
    sink = JsonlSink(tmp_path / "metrics.jsonl", "train", 0)
    sink.log_metrics({"train/loss": 2.0}, 4)
    sink.log_metrics({"train/loss": 9.0}, 6)
    sink.log_event("nonfinite", 7, "loss is nan")
    sink.drop_after(5)
    events = [line.get("event") for line in read_lines(tmp_path / "metrics.jsonl")]
    assert events == [None, "nonfinite", "rolled_back"]


def test_times_grow_when_the_clock_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.jsonl"
    Journal(path).append({"a": 1})
    now = read_lines(path)[0]["time"]
    assert abs(now - time.time() * 1000) < 60_000
    monkeypatch.setattr(journal.time, "time", lambda: 5.0)
    again = Journal(path)
    again.append({"a": 2})
    again.append({"a": 3})
    assert [line["time"] - now for line in read_lines(path)] == [0, 1, 2]


def test_a_reader_goes_on_and_starts_again_in_a_file_that_was_written_anew(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    lines = Journal(path)
    for number in range(450):
        lines.append({"n": number})
    reader, seen = LineReader(path), []
    while found := reader.peek(lambda line: line["n"] >= 10):
        assert found == reader.peek(lambda line: line["n"] >= 10), "what is not left behind comes again"
        assert len(found) <= journal.CHUNK_LINES
        seen += [line["n"] for line in found]
        reader.advance()
    assert seen == list(range(10, 450))
    with path.open("a") as handle:
        handle.write('{"n": 500, "time"')
    assert reader.peek(lambda line: True) == [], "half a line is none"
    with path.open("a") as handle:
        handle.write(": 1}\n")
    assert [line["n"] for line in reader.peek(lambda line: True)] == [500]
    reader.advance()
    other = tmp_path / "y.jsonl"
    other.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[400:]))
    other.replace(path)
    assert [line["n"] for line in reader.peek(lambda line: True)] == [*range(400, 450), 500]
    path.unlink()
    reader.advance()
    assert reader.peek(lambda line: True) == []


def test_what_waits_is_counted_and_told_in_words(tmp_path: Path):
    parent, stage = open_stage(tmp_path, "train")
    sink = make_sink(tmp_path, stage)
    sink.log_metrics({"a": 1.0, "b": 2.0}, 1)
    sink.log_event("nonfinite", 2, "x")
    JsonlSink(tmp_path / "metrics.jsonl", "base_model", 0).log_metrics({"a": 1.0}, 1)
    stage.log_params({"x": 1})
    parent.log_artifact(tmp_path / "metrics.jsonl")
    backlog = count_backlog(tmp_path)
    assert (backlog.numbers, backlog.entries, backlog.artifacts, backlog.is_empty) == (3, 4, 1, False)
    assert backlog.describe() == "3 metric values, 4 lineage entries, 1 artifact"


def test_no_secret_of_an_address_is_written_into_the_outbox(tmp_path: Path):
    parent, stage = open_stage(tmp_path, "train")
    parent.log_params({"uri": "http://anna:hunter2@host"})
    parent.set_tags({"uri": "http://anna:hunter2@host"})
    make_sink(tmp_path, stage).log_event("worker_failure", 0, "cannot reach http://anna:hunter2@host")
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert written.count(b"http://***@host") == 3 and b"hunter2" not in written


def test_no_address_travels_to_the_workers_and_no_engine_is_imported_there(tmp_path: Path):
    config = TrackingConfig(backend="jsonl", uri="http://anna:hunter2@host")
    factory = RunSinkFactory(tmp_path / "metrics.jsonl", "train", open_tracker(config, tmp_path, "run"))
    (tmp_path / "factory").write_bytes(pickle.dumps(factory))
    assert b"hunter2" not in (tmp_path / "factory").read_bytes() and "hunter2" not in repr(config)
    load = f"import pickle, sys; pickle.load(open({str(tmp_path / 'factory')!r}, 'rb')); print('mlflow' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", load], text=True).strip() == "False"


def test_no_backend_keeps_nothing(tmp_path: Path):
    tracker = open_tracker(TrackingConfig(backend="jsonl"), tmp_path, "run")
    assert isinstance(tracker.child("x"), NoopTracker) and tracker.events_path() is None
    assert list(tmp_path.iterdir()) == []


def test_what_drives_a_training_does_not_import_model_code():
    load = "import layerplan.train.trainer, sys; print({'transformers', 'layerplan.train.worker'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", load], text=True).strip() == "set()"


@contextlib.contextmanager
def listening() -> Iterator[str]:
    """Takes connections and never answers, as a stopped server does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_probe_says_in_seconds_what_is_wrong_and_never_the_address(tmp_path: Path):
    with listening() as address:
        started = time.monotonic()
        assert probe(f"http://anna:hunter2@{address}/x") == "no answer in time"
        assert time.monotonic() - started < 2 * PROBE_S + 0.5
        assert probe(f"postgresql://anna:hunter2@{address}/db") is None
    assert probe(f"http://anna:hunter2@{address}/x") == os.strerror(111)
    assert "hunter2" not in str(probe("http://anna:hunter2@[::1/x"))
    database = tmp_path / "x.db"
    assert probe(f"sqlite:///{database}") is None
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("CREATE TABLE t (x)")
        assert probe(f"sqlite:///{database}") is None
        other.execute("BEGIN EXCLUSIVE")
        assert probe(f"sqlite:///{database}") == "database is locked"
    (tmp_path / "file").write_text("in the way")
    assert probe(f"sqlite:///{tmp_path}/file/x.db") == f"{tmp_path}/file is no folder that can be written"


def test_an_address_of_mlflows_own_that_is_not_asked_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://anna:hunter2-open-sesame@mlflow.example:5000")
    monkeypatch.setattr(BackgroundSender, "start", lambda self, **options: None)  # what is told comes before it
    said: list[str] = []
    (tmp_path / "run").mkdir()
    open_tracker(TrackingConfig(), tmp_path / "run", "run", said.append)
    assert said == [
        "MLFLOW_TRACKING_URI=http://***@mlflow.example:5000 is not asked, the lineage goes to"
        f" sqlite:///{tmp_path}/mlflow.db; set tracking.uri to the address for it"
    ]
    open_tracker(TrackingConfig(uri="http://127.0.0.1:9"), tmp_path / "run", "run", said.append)
    assert len(said) == 1
