"""An MLflow server that goes away for a while."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

START_TIMEOUT_S = 120


class TrackingServer:
    """A server of its own over a SQLite file in `folder`."""

    def __init__(self, folder: Path, away_s: float = 6.0) -> None:
        self._folder = folder
        self.away_s = away_s
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._process = self._start()
        self._wait_until_it_answers()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    def restart(self) -> None:
        """Kills it, and starts it again after `away_s`, while whoever called goes on."""
        self.stop()
        timer = threading.Timer(self.away_s, self._come_back)
        timer.daemon = True
        timer.start()

    def stop(self) -> None:
        """Kills it with its workers."""
        import psutil

        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self._process.kill()
        self._process.wait()
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue

    def _come_back(self) -> None:
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [Path(sys.executable).with_name("mlflow"), "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"]
        env = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "mlflow_server.txt").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, env=env)

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        raise AssertionError("the tracking server did not start")
