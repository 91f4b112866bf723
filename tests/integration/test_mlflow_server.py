"""`cluster/mlflow/serve.sh` as a team starts it: metrics and artifacts go through the server, which keeps both in one folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from tests.mlflow_server import QUIET, START_TIMEOUT_S

ROOT = Path(__file__).resolve().parents[2]


def test_the_server_keeps_metrics_and_artifacts_where_it_is_told(tmp_path: Path) -> None:
    import mlflow

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    env = os.environ | QUIET | {"DATA": str(tmp_path / "data"), "PORT": str(free_port), "VENV": sys.prefix}
    with (tmp_path / "said.txt").open("w") as said:
        server = subprocess.Popen(
            ["bash", "cluster/mlflow/serve.sh"], cwd=ROOT, env=env, stdout=said, stderr=said, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{free_port}"
        wait_for(f"{address}/health", server, tmp_path / "said.txt")
        client = mlflow.MlflowClient(tracking_uri=address)
        run = client.create_run(client.create_experiment("team"))
        client.log_metric(run.info.run_id, "train/loss", 2.5, step=1)
        client.log_text(run.info.run_id, "a page", "report.html")
        assert client.get_run(run.info.run_id).data.metrics == {"train/loss": 2.5}
        assert run.info.artifact_uri.startswith("mlflow-artifacts:"), (
            "proxied, so that clients need no way to the folder"
        )
        (kept,) = (tmp_path / "data" / "mlartifacts").rglob("report.html")
        assert kept.read_text() == "a page" and (tmp_path / "data" / "mlflow.db").exists()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(address: str, server: subprocess.Popen[bytes], said: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert server.poll() is None, said.read_text()[-3000:]
        with suppress(OSError), urllib.request.urlopen(address, timeout=2):
            return
        time.sleep(0.2)
    raise AssertionError(said.read_text()[-3000:])
