"""A real MLflow server to break, and what a test needs to send to a store and to read it back."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from layerplan.tracking.outbox import PARENT, Outbox, OutboxTracker, TrackingFolder
from layerplan.tracking.tracker import RunSinkFactory, Tracker

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
START_TIMEOUT_S = 120


class MlflowServer:
    """A server process over a database and a folder for artifacts; it can be killed, stopped and started again."""

    def __init__(self, database: Path, artifacts: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._stores = ("--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(artifacts))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        self._process = subprocess.Popen(
            [*command, "--workers", "1", *self._stores],
            env={**os.environ, **QUIET},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return
            time.sleep(0.1)
        raise AssertionError("the server did not start")

    def signal(self, number: int) -> None:
        """Sends a signal to all of its processes."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


def make_database(path: Path) -> Path:
    """An MLflow database with its tables, which take seconds to make: one is made and copied."""
    import mlflow

    mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments(max_results=1)
    return path


def open_stage(run_dir: Path, stage: str) -> tuple[OutboxTracker, OutboxTracker]:
    """The parent and a stage of a run whose outbox nothing carries."""
    parent = OutboxTracker(Outbox(TrackingFolder(run_dir)), PARENT, run_dir.name)
    return parent, parent.child(stage)


def make_sink(run_dir: Path, tracker: Tracker, start_step: int = 0) -> Any:
    """A worker's sink for the stage `train`."""
    return RunSinkFactory(run_dir / "metrics.jsonl", "train", tracker)(start_step)


def carry(run_dir: Path, uri: str) -> list[Exception]:
    """Sends all that goes; returns what failed."""
    from layerplan.tracking.carrier import Carrier
    from layerplan.tracking.mlflow_store import MlflowStore

    folder = TrackingFolder(run_dir)
    store = MlflowStore(uri, "layerplan", folder)
    store.open()
    carrier = Carrier(folder, store)
    while True:
        carried = carrier.carry()
        if carried.failures or not carried.lines:
            return carried.failures


def points_of(client: Any, run_id: str, key: str) -> list[tuple[int, float]]:
    """Step and value of every point of a metric, in the order they were logged."""
    history = sorted(client.get_metric_history(run_id, key), key=lambda point: point.timestamp)
    return [(point.step, point.value) for point in history]
