"""`cluster/mlflow/compose.yaml` without Docker: its commands and environment, over a real PostgreSQL and a store of S3."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from layerplan.config.tracking import TrackingConfig
from layerplan.tracking.outbox import TrackingFolder
from layerplan.tracking.position import Positions, count_backlog
from layerplan.tracking.tracker import open_tracker
from tests.buckets import BucketServer
from tests.compose import NotSetError, read_services
from tests.mlflow_server import QUIET, carry, make_sink, points_of
from tests.postgres import running_postgres, why_not

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster/mlflow"
SECRETS = {
    "POSTGRES_PASSWORD": "rootplanted51",
    "MLFLOW_DATABASE_PASSWORD": "dbplanted52",
    "STORE_PASSWORD": "storeplanted53",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "adminplanted54",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "keyplanted55" * 3,
}
EXTRA = ("psycopg", "psycopg-binary", "flask-wtf", "wtforms")
"""What the server needs beside this repository's lock."""
START_S = 180


@dataclass(frozen=True)
class Team:
    """The server, and the store behind it."""

    uri: str
    store: BucketServer
    pid: int
    folder: Path


@pytest.fixture(scope="module")
def extra_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages that only the server has, at the versions of its lock, in a folder of their own."""
    folder = tmp_path_factory.mktemp("packages")
    pins = [line for line in (FOLDER / "requirements.txt").read_text().split() if line.partition("==")[0] in EXTRA]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *pins]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"pip install {' '.join(pins)}: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, extra_packages: Path, s3_server: BucketServer) -> Iterator[Team]:
    """The services in the order of the file; names of containers become addresses here."""
    if fault := why_not():
        pytest.skip(fault)
    folder = tmp_path_factory.mktemp("team")
    services = read_services(FOLDER / "compose.yaml", SECRETS | {"MLFLOW_WORKERS": "1"})
    with running_postgres(services["postgres"].environment, FOLDER / "make_databases.sh") as database:
        port = find_free_port()
        here = {
            "postgres:5432": f"127.0.0.1:{database}",
            "http://store:9000": s3_server.endpoint,
            "0.0.0.0": "127.0.0.1",
        }
        subprocess.run([*services["postgres"].health, "--port", str(database)], check=True)

        def start(name: str, said: Path) -> subprocess.Popen[bytes]:
            given = {key: swap(value, here) for key, value in services[name].environment.items()}
            env = {
                **os.environ,
                **QUIET,
                **given,
                "PYTHONPATH": str(extra_packages),
                "PYTHON": sys.executable,
                "TMPDIR": str(folder),
            }
            if "PORT" in given:
                env["PORT"] = str(port)
            command = [sys.executable if word == "python" else word for word in services[name].command]
            with said.open("w") as file:
                return subprocess.Popen(command, cwd=FOLDER, env=env, stdout=file, stderr=file, start_new_session=True)

        for _ in range(2):  # at every start of the whole
            assert start("bucket", folder / "bucket.txt").wait(timeout=60) == 0, (folder / "bucket.txt").read_text()
        server = start("mlflow", folder / "mlflow.txt")
        try:
            wait_until(lambda: ask(f"http://127.0.0.1:{port}/health") == 200, server, folder / "mlflow.txt")
            yield Team(f"http://127.0.0.1:{port}", s3_server, server.pid, folder)
            os.kill(server.pid, signal.SIGTERM)
            server.wait(timeout=60)
            assert list(folder.rglob("basic_auth.ini")) == [], "the file with the password goes with the server"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def find_free_port() -> int:
    found = subprocess.run(
        [sys.executable, ROOT / "cluster/local/ports.py", "free", "1"], stdout=subprocess.PIPE, check=True
    )
    return int(found.stdout)


def swap(text: str, names: dict[str, str]) -> str:
    for name, here in names.items():
        text = text.replace(name, here)
    return text


def ask(address: str, **headers: str) -> int | None:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def wait_until(is_true: Callable[[], bool], process: Any = None, said: Path | None = None) -> None:
    deadline = time.monotonic() + START_S
    while not is_true():
        alive = process is None or process.poll() is None
        assert alive and time.monotonic() < deadline, said.read_text()[-4000:] if said else "not in time"
        time.sleep(0.2)


@pytest.fixture
def admin(team: Team, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client that is let in."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRETS["MLFLOW_AUTH_ADMIN_PASSWORD"])
    return mlflow.MlflowClient(tracking_uri=team.uri)


def test_who_has_no_password_or_asks_for_another_host_is_refused(team: Team) -> None:
    search = f"{team.uri}/api/2.0/mlflow/experiments/search?max_results=1"
    assert ask(search) == 401
    assert ask(f"{team.uri}/api/2.0/mlflow-artifacts/artifacts?path=") == 401
    assert ask(search, Authorization="Basic YWRtaW46cGFzc3dvcmQxMjM0") == 401, "the password MLflow once came with"
    assert ask(search, Host="elsewhere.example:5000") == 403


def test_a_run_is_carried_with_the_password_of_the_environment_and_its_files_go_through_the_server(
    team: Team, admin: Any, tmp_path: Path
) -> None:
    run_dir = tmp_path / "carried"
    run_dir.mkdir()
    (run_dir / "report.html").write_text("a page")
    said: list[str] = []
    tracker = open_tracker(TrackingConfig(uri=team.uri), run_dir, "carried", said.append)
    stage = tracker.child("train")
    sink = make_sink(run_dir, stage)
    for step in (1, 2):
        sink.log_metrics({"train/loss": 3.0 - step}, step)
    stage.log_artifact(run_dir / "report.html")
    wait_until(lambda: has_sent(run_dir))
    stage.close()
    tracker.close()
    assert said == []
    (run,) = [each for each in admin.search_runs([find_experiment(admin)]) if "train/loss" in each.data.metrics]
    assert points_of(admin, run.info.run_id, "train/loss") == [(1, 2.0), (2, 1.0)]
    assert run.info.artifact_uri.startswith("mlflow-artifacts:"), "clients need no key of the store"
    assert any(key.endswith("report.html") for key in team.store.list_keys("mlflow"))


def test_a_wrong_password_is_one_line_and_loses_nothing(
    team: Team, admin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "locked"
    run_dir.mkdir()
    said: list[str] = []
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrongplanted56")
    tracker = open_tracker(TrackingConfig(uri=team.uri), run_dir, "locked", said.append)
    stage = tracker.child("train")
    make_sink(run_dir, stage).log_metrics({"train/loss": 2.5}, 1)
    wait_until(lambda: bool(said))
    stage.close()
    tracker.close()
    assert len(said) == 2 and "\n" not in said[0] and "planted" not in "".join(said)
    assert "MLFLOW_TRACKING_PASSWORD" in said[0], said
    assert f"layerplan track sync {run_dir}" in said[1]
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRETS["MLFLOW_AUTH_ADMIN_PASSWORD"])
    assert carry(run_dir, team.uri) == [], "by the next submission, or `layerplan track sync`"
    (run,) = [each for each in admin.search_runs([find_experiment(admin)]) if each.data.metrics == {"train/loss": 2.5}]
    assert points_of(admin, run.info.run_id, "train/loss") == [(1, 2.5)]


def test_no_secret_is_on_a_command_line_or_in_what_the_server_says(team: Team) -> None:
    import psutil

    server = psutil.Process(team.pid)
    commands = [" ".join(each.cmdline()) for each in (server, *server.children(recursive=True))]
    assert any("basic-auth" in each or "uvicorn" in each for each in commands), commands
    assert "planted" not in "".join(commands) + (team.folder / "mlflow.txt").read_text()


def find_experiment(client: Any) -> str:
    (experiment,) = [each for each in client.search_experiments() if each.name == "layerplan"]
    return str(experiment.experiment_id)


def has_sent(run_dir: Path) -> bool:
    return bool(Positions.load(TrackingFolder(run_dir).sent).sent) and count_backlog(run_dir).is_empty


@pytest.mark.parametrize("name", SECRETS)
def test_the_file_insists_on_every_secret(name: str) -> None:
    with pytest.raises(NotSetError, match=name):
        read_services(FOLDER / "compose.yaml", {key: value for key, value in SECRETS.items() if key != name})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"POSTGRES": "sqlite:///x"}, "POSTGRES must be postgresql://USER:PASSWORD@HOST:PORT, without a database"),
        ({"POSTGRES": "postgresql://a:b@c/mlflow"}, "POSTGRES must be postgresql://"),
        ({"ARTIFACTS": ""}, "ARTIFACTS is not set"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": "short"}, "MLFLOW_AUTH_ADMIN_PASSWORD must have 12 characters or more"),
        ({"MLFLOW_FLASK_SERVER_SECRET_KEY": "short"}, "MLFLOW_FLASK_SERVER_SECRET_KEY must have 32 characters"),
        ({"PERMISSION": "ALL"}, "PERMISSION=ALL: must be READ, EDIT, MANAGE or NO_PERMISSIONS"),
    ],
)
def test_a_setting_that_is_wrong_or_weak_is_one_line(settings: dict[str, str], said: str) -> None:
    good = {"POSTGRES": "postgresql://a:b@c:5432", "ARTIFACTS": "/x", **SECRETS}
    env = {"PATH": os.environ["PATH"], **good, **settings}
    done = subprocess.run(["bash", FOLDER / "team.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
