"""A run beside somebody else's Ray cluster on the same machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.ray_script import run_script, script_environment


@pytest.fixture(scope="module")
def foreign_cluster() -> Iterator[str]:
    """A cluster that `ray start` made and noted as the machine's latest; yields Ray's folder, where the note lies."""
    with tempfile.TemporaryDirectory(prefix="lpf", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=1", "--port=0"]
        command += ["--node-ip-address=127.0.0.1", "--include-dashboard=true", "--dashboard-port=0"]
        process = subprocess.Popen(
            command, env=script_environment(RAY_TMPDIR=folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 120
            while not (Path(folder) / "ray" / "ray_current_cluster").exists():
                assert process.poll() is None and time.monotonic() < deadline, "the foreign cluster did not start"
                time.sleep(0.2)
            yield folder
        finally:
            for each in [
                *psutil.Process(process.pid).children(recursive=True),
                process,
            ]:  # asked, they take half a minute
                each.kill()
            process.wait(timeout=60)


def test_a_worker_asks_its_own_cluster_whether_a_run_is_alive(foreign_cluster: str) -> None:
    done = run_script(__file__, timeout_s=300, RAY_TMPDIR=foreign_cluster)
    assert done.returncode == 0 and "the same cluster: True" in done.stdout, done.stdout[-3000:]
    assert "asked for a token: True, which lies in no file: True" in done.stdout


def test_workers_of_another_cluster_stand_where_the_job_does(foreign_cluster: str, tmp_path: Path) -> None:
    """A relative path of a config means one thing, in tasks and in training; that cluster was started in another folder."""
    address = (Path(foreign_cluster) / "ray" / "ray_current_cluster").read_text().strip()
    folder = tmp_path / "some \u6587\u4ef6"
    folder.mkdir()
    done = run_script(__file__, folder, timeout_s=300, RAY_ADDRESS=address, RAY_TMPDIR=foreign_cluster)
    assert done.returncode == 0, done.stdout[-3000:]
    assert {name: (folder / name).read_text() for name in ("task", "training")} == dict.fromkeys(
        ("task", "training"), str(folder)
    )


def note_folder(name: str) -> None:
    """In a worker: writes where it stands to a relative path."""
    Path(name).write_text(str(Path.cwd()))


def work_in(folder: str) -> None:
    """Joins the cluster of RAY_ADDRESS from a folder and has a task and a training worker write there."""
    import ray
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from layerplan.config.cluster import ClusterConfig
    from layerplan.ray_session import connect

    os.chdir(folder)
    connect(ClusterConfig(), min_cpus=1)
    ray.get(ray.remote(note_folder).remote("task"))
    TorchTrainer(lambda: note_folder("training"), scaling_config=ScalingConfig(num_workers=1)).fit()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work_in(sys.argv[1])
        raise SystemExit
    import ray
    from ray.util.state import list_nodes

    from layerplan.config.cluster import ClusterConfig
    from layerplan.ray_session import connect
    from tests.planted import find_files_with

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        os.environ.pop(name)
    os.environ["HOME"] = os.environ["RAY_TMPDIR"]
    connect(ClusterConfig(num_cpus=1), min_cpus=1)
    dashboard = ray.get_runtime_context().runtime_env["env_vars"]["RAY_API_SERVER_ADDRESS"]
    try:
        urllib.request.urlopen(f"{dashboard}/api/v0/tasks", timeout=30)
    except urllib.error.HTTPError as error:
        is_kept = find_files_with(os.environ["RAY_AUTH_TOKEN"], Path(os.environ["RAY_TMPDIR"])) == []
        print(f"asked for a token: {error.code == 401}, which lies in no file: {is_kept}")
    ask = ray.remote(lambda: [node.node_id for node in list_nodes()])
    print("the same cluster:", ray.get(ask.remote()) == [node["NodeID"] for node in ray.nodes()])
