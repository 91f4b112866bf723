"""One machine's cluster listens on loopback only, wants its token, and shows no secret that it was given."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.planted import MARK, PLANTED, find_files_with
from tests.ray_script import run_script, script_environment
from tests.sockets import find_open, list_listening, watch_listening

ROOT = Path(__file__).resolve().parents[2]
TASK = (
    "import ray; ray.init(address='{}', logging_level='ERROR'); print('ran', ray.get(ray.remote(lambda: 1).remote()))"
)


def free_ports() -> list[str]:
    command = [sys.executable, ROOT / "cluster/local/ports.py", "free", "2"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture(scope="module")
def started() -> Iterator[dict[str, Any]]:
    """`cluster/local/start.sh` by a user who has no token yet; yields its ports, process, and folder."""
    port, dashboard = free_ports()
    with tempfile.TemporaryDirectory(prefix="lpc", dir="/tmp", ignore_cleanup_errors=True) as folder:
        env = {key: value for key, value in script_environment().items() if not key.startswith("RAY_")}
        env |= {"HOME": folder, "RAY_TMPDIR": folder, "VENV": sys.prefix}
        process = subprocess.Popen(
            ["bash", "cluster/local/start.sh"],
            env=env | {"RAY_PORT": port, "DASHBOARD_PORT": dashboard},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_for_answer(f"http://127.0.0.1:{dashboard}/api/version", process)
            address = f"127.0.0.1:{port}"
            yield {"address": address, "dashboard": dashboard, "pid": process.pid, "folder": Path(folder), "env": env}
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def wait_for_answer(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while ask_without_token(url) is None:
        assert process.poll() is None and time.monotonic() < deadline, "the cluster did not start"
        time.sleep(0.3)


def ask_without_token(url: str) -> int | None:
    """The status of the answer; None when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def run_as_stranger(started: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Another user of this machine, who finds the address and has no token: Ray gives up after 20 s."""
    strange = {"HOME": str(started["folder"] / "stranger"), "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(
        [sys.executable, "-c", TASK.format(started["address"])],
        env=started["env"] | strange | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_a_started_cluster_is_closed_and_shows_no_secret(started: dict[str, Any]) -> None:
    """A client without the token runs nothing; one with it hands its workers secrets that nothing shows."""
    token = started["folder"] / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    with ThreadPoolExecutor(1) as beside, watch_listening(started["pid"]) as listening:
        refused = beside.submit(run_as_stranger, started)
        done = run_script(
            __file__,
            started["folder"],
            timeout_s=240,
            HOME=str(started["folder"]),
            RAY_TMPDIR=str(started["folder"]),
            RAY_ADDRESS=started["address"],
            RAY_AUTH_TOKEN=token.read_text(),
            RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{started['dashboard']}",
            **PLANTED,
        )
    assert done.returncode == 0, done.stdout[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["arrived"] == PLANTED, "the cluster was started without them"
    assert said["answers"] > 8 and said["shown_by"] == []
    assert find_files_with(MARK, started["folder"]) == []
    assert find_open(listening) | find_open({(name, ip) for name, ip in said["listening"]}) == set()
    assert {"gcs_server", "raylet"} <= {name for name, _ in listening}
    for path in ("/api/jobs/", "/api/v0/tasks", "/api/v0/runtime_envs"):
        assert ask_without_token(f"http://127.0.0.1:{started['dashboard']}{path}") == 401
    stranger = refused.result()
    assert stranger.returncode != 0 and "ran" not in stranger.stdout
    assert "Failed to connect to Ray cluster" in stranger.stderr and "token" in stranger.stderr, stranger.stderr[-2000:]


def test_a_job_without_an_address_is_closed_and_its_files_show_no_secret(finished_run: Path) -> None:
    """The whole chain, as it ran for the other tests: tracing, training of two workers, an engine of vLLM."""
    seen = json.loads((finished_run.parent / "listening.json").read_text(encoding="utf-8"))
    listening = {(name, address) for name, address in seen["listening"]}
    assert {"gcs_server", "raylet"} <= {name for name, _ in listening}
    assert any("RayTrainWorker" in name for name, _ in listening), "training was not looked at"
    assert find_open(listening) == set()
    assert find_files_with(MARK, finished_run.parent, Path(seen["ray_folder"])) == []


if __name__ == "__main__":
    import ray
    from ray.util import state

    from layerplan.config.cluster import ClusterConfig
    from layerplan.ray_session import connect

    connect(ClusterConfig(), min_cpus=1)

    @ray.remote
    class Actor:
        def read(self, names: list[str]) -> dict[str, str | None]:
            return {name: os.environ.get(name) for name in names}

    actor = Actor.remote()
    arrived = ray.get(actor.read.remote(list(PLANTED)))
    lists = ("actors", "tasks", "workers", "nodes", "jobs", "objects", "runtime_envs", "placement_groups")
    answers = {name: str(getattr(state, f"list_{name}")(detail=True)) for name in lists}
    for path in ("/api/jobs/", "/logical/actors", "/nodes?view=summary", "/api/v0/logs", "/api/train/v2/runs/v1"):
        request = urllib.request.Request(os.environ["RAY_API_SERVER_ADDRESS"] + path)
        request.add_header("Authorization", f"Bearer {os.environ['RAY_AUTH_TOKEN']}")
        try:
            answers[path] = urllib.request.urlopen(request, timeout=30).read().decode()
        except urllib.error.HTTPError as error:
            assert error.code != 401, path
    shown_by = [name for name, text in answers.items() if MARK in text]
    mine = sorted(list_listening(os.getpid()))
    print(json.dumps({"arrived": arrived, "answers": len(answers), "shown_by": shown_by, "listening": mine}))
