"""A real MLflow server that dies, hangs or is not there: a run neither waits for it nor loses a thing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from layerplan.config.load import dump_config, validate_config
from layerplan.config.tracking import TrackingConfig
from layerplan.errors import TrackingError
from layerplan.tracking.outbox import TrackingFolder
from layerplan.tracking.position import Positions, count_backlog
from layerplan.tracking.tracker import open_tracker
from tests.mlflow_server import MlflowServer, make_database, make_sink, points_of
from tests.small_disk import fill, small_disk

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hunter2-open-sesame"
PATIENCE_S = 240
DISK_KIB = 512
"""Room for what a run logs, and no more."""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("server") / "mlflow.db")


@pytest.fixture
def server(database: Path, tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(Path(shutil.copy(database, tmp_path / "server.db")), tmp_path / "kept")
    yield server
    server.kill()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    return folder


def with_password(server: MlflowServer) -> str:
    return server.uri.replace("://", f"://anna:{SECRET}@")


def client_of(server: MlflowServer) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=server.uri)


def train_id(run_dir: Path) -> str:
    return json.loads((run_dir / "mlflow_runs.json").read_text())["train"]


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline, "did not come to pass in time"
        time.sleep(0.05)


def has_sent(run_dir: Path) -> bool:
    return bool(Positions.load(TrackingFolder(run_dir).sent).sent) and count_backlog(run_dir).is_empty


def test_a_server_that_hangs_then_dies_then_returns_costs_the_run_no_time_and_no_point(
    run_dir: Path, server: MlflowServer
):
    server.start()
    said: list[str] = []
    tracker = open_tracker(TrackingConfig(uri=with_password(server)), run_dir, "run", said.append)
    stage = tracker.child("train")
    sink = make_sink(run_dir, stage)
    sink.log_metrics({"train/loss": 3.0}, 1)
    wait_until(lambda: has_sent(run_dir))
    started = time.process_time(), time.monotonic()
    for step, accident in ((2, signal.SIGSTOP), (3, None), (4, signal.SIGKILL), (5, None)):
        if accident is not None:
            server.signal(accident)
        sink.log_metrics({"train/loss": 4.0 - step}, step)
        stage.set_tags({f"seen.{step}": "yes"})
    assert time.monotonic() - started[1] < 2, "a call waited for the server"
    wait_until(lambda: bool(said))
    server.kill()
    server.start()
    wait_until(lambda: has_sent(run_dir))
    tracker.close()
    run = client_of(server).get_run(train_id(run_dir))
    assert points_of(client_of(server), train_id(run_dir), "train/loss") == [(1, 3), (2, 2), (3, 1), (4, 0), (5, -1)]
    assert {key for key in run.data.tags if key.startswith("seen.")} == {"seen.2", "seen.3", "seen.4", "seen.5"}
    assert [line.partition(";")[2] for line in said] == [
        f" the run goes on, what it logs is kept in {run_dir} and sent when the store answers",
        " what was kept is being sent",
    ]
    assert SECRET not in "".join(said)


def test_a_server_that_is_down_at_the_start_is_one_line_and_gets_all_of_it_later(run_dir: Path, server: MlflowServer):
    config = validate_config(
        {
            "name": "run",
            "model": {"type": "pretrained", "name": "m"},
            "tracking": {"uri": f"{with_password(server)}/?token={SECRET}"},
        }
    )
    (run_dir / "resolved_config.json").write_text(dump_config(config))
    said: list[tuple[float, str]] = []
    started = time.monotonic()
    tracker = open_tracker(
        config.tracking, run_dir, "run", lambda line: said.append((time.monotonic() - started, line))
    )
    stage = tracker.child("train")
    sink = make_sink(run_dir, stage)
    for step in range(1, 2001):
        sink.log_metrics({"train/loss": float(step), "perf/mfu": 0.5}, step)
    tracker.log_artifact(run_dir / "resolved_config.json")
    wait_until(lambda: bool(said))
    assert said[0][0] < 5 and "Connection refused" in said[0][1]
    closing = time.monotonic()
    stage.close()
    tracker.close()
    assert time.monotonic() - closing < 8
    assert len(said) == 2 and "4,000 metric values, 5 lineage entries, 1 artifact" in said[1][1]
    assert said[1][1].endswith(f"send it with: layerplan track sync {run_dir}")

    server.start()
    command = [sys.executable, "-m", "layerplan.cli", "track", "sync", str(run_dir)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "is kept without its credentials; give it with --uri" in refused.stderr
    done = subprocess.run(
        [*command, "--uri", with_password(server)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[tracking] everything has arrived"), done.stderr
    points = points_of(client_of(server), train_id(run_dir), "train/loss")
    assert points == [(step, step) for step in range(1, 2001)]
    assert client_of(server).get_run(train_id(run_dir)).info.status == "FINISHED"
    written = [path for path in (*run_dir.rglob("*"), *(server_files(server))) if path.is_file()]
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in refused.stderr + done.stdout + done.stderr + "".join(line for _, line in said)


def test_a_stop_that_is_told_to_all_processes_of_a_job_is_in_the_store(run_dir: Path, server: MlflowServer) -> None:
    """`ray job stop` sends SIGTERM to the sending process too, which still has the end to send."""
    server.start()
    said: list[str] = []
    tracker = open_tracker(TrackingConfig(uri=server.uri), run_dir, "run", said.append)
    deadline = time.monotonic() + PATIENCE_S
    while not TrackingFolder(run_dir).place.exists():
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
    (sender,) = (each for each in psutil.Process().children() if "layerplan.tracking.sender" in each.cmdline())
    sender.terminate()
    tracker.log_metrics({"result/steps": 3.0}, step=3)
    tracker.close("KILLED")
    assert said == [] and count_backlog(run_dir).is_empty
    run = client_of(server).get_run(json.loads((run_dir / "mlflow_runs.json").read_text())["parent"])
    assert (run.info.status, run.data.metrics) == ("KILLED", {"result/steps": 3.0})


def test_a_server_whose_disk_is_full_costs_the_run_no_time_and_gets_all_of_it_later(
    run_dir: Path, database: Path, tmp_path: Path
):
    """Reads are answered all the while; only what is to be written fails."""
    with small_disk(tmp_path / "disk", database.stat().st_size // 1024 + DISK_KIB) as fault:
        if fault:
            pytest.skip(f"a small disk is needed: {fault}")
        server = MlflowServer(Path(shutil.copy(database, tmp_path / "disk" / "server.db")), tmp_path / "disk" / "kept")
        server.start()
        try:
            said: list[str] = []
            tracker = open_tracker(TrackingConfig(uri=server.uri), run_dir, "run", said.append)
            stage = tracker.child("train")
            sink = make_sink(run_dir, stage)
            sink.log_metrics({"train/loss": 3.0}, 1)
            wait_until(lambda: has_sent(run_dir))
            ballast = fill(tmp_path / "disk")
            started = time.monotonic()
            for step in range(2, 302):
                sink.log_metrics({"train/loss": float(step)}, step)
            stage.set_tags({"seen": "yes"})
            assert time.monotonic() - started < 2, "a call waited for the server"
            wait_until(lambda: bool(said))
            assert not has_sent(run_dir), "there was room"
            ballast.unlink()
            wait_until(lambda: has_sent(run_dir))
            tracker.close()
            points = points_of(client_of(server), train_id(run_dir), "train/loss")
            assert points == [(1, 3.0), *((step, float(step)) for step in range(2, 302))]
            assert client_of(server).get_run(train_id(run_dir)).data.tags["seen"] == "yes"
            assert "what it logs is kept" in said[0] and said[-1].endswith("what was kept is being sent"), said
        finally:
            server.kill()


def server_files(server: MlflowServer) -> Iterator[Path]:
    """The artifacts and the database the server keeps."""
    database, artifacts = Path(server._stores[1].removeprefix("sqlite:///")), Path(server._stores[3])
    return iter([database, *artifacts.rglob("*")])


@pytest.mark.parametrize("what", ["down", "deleted"])
def test_a_required_store_that_does_not_take_the_run_ends_it_with_one_line(run_dir: Path, database: Path, what: str):
    import mlflow

    uri = f"http://anna:{SECRET}@127.0.0.1:9"
    if what == "deleted":
        uri = f"sqlite:///{shutil.copy(database, run_dir.parent / 'mlflow.db')}"
        client = mlflow.MlflowClient(tracking_uri=uri)
        client.delete_experiment(client.create_experiment("layerplan"))
    said: list[str] = []
    with pytest.raises(TrackingError) as caught:
        open_tracker(TrackingConfig(uri=uri, required=True), run_dir, "run", said.append)
    assert said == []
    words = str(caught.value)
    named = (
        "tracking.uri=http://***@127.0.0.1:9: " if what == "down" else "tracking.experiment=layerplan: was deleted in"
    )
    assert words.startswith(named) and "tracking.required=true" in words and "\n" not in words
