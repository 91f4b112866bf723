"""Training across hosts that are hosts: own network, own processes, own raylet; a shared folder for the run.

The file is also the program the tests start on the first host: `python test_hosts.py FOLDER RUN STEPS` trains a run on the
cluster of RAY_ADDRESS.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerplan.artifacts import read_lines
from tests.network_hosts import PORT, START_S, Host, running_hosts, why_not
from tests.tiny_store import make_inputs

NUM_STEPS = 12
S3_PORT, BUCKET = 5000, "runs"
S3_SERVER = f"""
import signal
from moto.server import ThreadedMotoServer
ThreadedMotoServer(ip_address="0.0.0.0", port={S3_PORT}, verbose=False).start()
signal.pause()
"""
SLOW_STEP_S = 0.5
WORKER_CPUS = 1.5
"""On hosts of two: workers cannot share a host."""


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[list[Host]]:
    """Two hosts, each with its raylet."""
    if fault := why_not():
        (pytest.fail if os.environ.get("LAYERPLAN_HOSTS") == "required" else pytest.skip)(fault)
    with running_hosts(2, tmp_path) as network:
        start_rays(network.hosts)
        yield network.hosts


def start_rays(hosts: list[Host]) -> float:
    """Starts all raylets; returns the seconds that took, from which limits of time follow."""
    started = time.monotonic()
    hosts[0].start_ray(head=None, num_cpus=2)
    for host in hosts[1:]:
        host.start_ray(head=hosts[0].address, num_cpus=2)
    return time.monotonic() - started


@pytest.mark.long
def test_a_worker_is_killed_on_another_host_and_every_row_is_read_once(two_hosts: list[Host], tmp_path: Path) -> None:
    make_inputs(tmp_path)
    head, other = two_hosts
    training = start_training(head, tmp_path, "run")
    wait_for(lambda: find_step(tmp_path / "run") >= 4, training, tmp_path / "run.txt")
    (worker,) = other.find("ray::RayTrainWorker")
    os.kill(worker, signal.SIGKILL)
    finish(training, tmp_path / "run.txt")
    said = (tmp_path / "run.txt").read_text()
    assert "[train] workers: 2 on 2 Ray nodes" in said
    assert said.count("s after a worker was lost") == 1, said[-3000:]
    check_rows(tmp_path / "run", NUM_STEPS)


@pytest.mark.long
def test_a_run_in_a_bucket_goes_on_from_it_when_a_worker_on_another_host_is_killed(
    two_hosts: list[Host], tmp_path: Path
) -> None:
    """The bucket's server is on the first host; a host has the run's files nowhere else than on its own disk."""
    make_inputs(tmp_path)
    head, other = two_hosts
    head.start(sys.executable, "-c", S3_SERVER, output=tmp_path / "s3.txt")
    endpoint = {"AWS_ENDPOINT_URL": f"http://{head.address}:{S3_PORT}", "AWS_REGION": "us-east-1"}
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    said = tmp_path / "run.txt"
    training = start_training(head, tmp_path, "run", bucket=endpoint | keys)
    wait_for(lambda: "step 5/" in said.read_text(), training, said)
    (worker,) = other.find("ray::RayTrainWorker")
    os.kill(worker, signal.SIGKILL)
    finish(training, said)
    assert said.read_text().count("s after a worker was lost") == 1, said.read_text()[-3000:]
    check_rows(tmp_path / "run", NUM_STEPS)


def start_training(head: Host, folder: Path, run: str, steps: int = NUM_STEPS, bucket: Mapping[str, str] = {}) -> Any:
    """Starts the program on the first host; the run lies in a bucket when the server of one is named."""
    env = {"RAY_ADDRESS": f"{head.address}:{PORT}", **bucket}
    words = (sys.executable, __file__, str(folder), run, str(steps))
    return head.start(*words, output=folder / f"{run}.txt", **env)


def wait_for(is_true: Callable[[], bool], training: Any, said: Path, limit_s: float = 2 * START_S) -> None:
    deadline = time.monotonic() + limit_s
    while not is_true():
        assert training.poll() in (None, 0), said.read_text()[-5000:]
        assert time.monotonic() < deadline, said.read_text()[-5000:]
        time.sleep(0.1)


def finish(training: Any, said: Path, limit_s: float = 3 * START_S) -> None:
    assert training.wait(timeout=limit_s) == 0, said.read_text()[-5000:]


def find_step(run: Path) -> int:
    """The newest step that was logged."""
    lines = [line["step"] for line in read_lines(run / "metrics.jsonl") if "train/loss" in line]
    return int(lines[-1]) if lines else 0


def check_rows(run: Path, steps: int) -> None:
    """Every step has the rows of the order, once."""
    import numpy as np

    from layerplan.corpus.stream import make_schedule
    from layerplan.train.ledger_check import load_ledger

    schedule = make_schedule(run.parent / "store", num_lanes=4, seed=0)
    rows = [step.row_ids for step in load_ledger(run)]
    assert rows == [tuple(np.sort(schedule.rows_at(step)).tolist()) for step in range(steps)]
    assert json.loads((run / "training.json").read_text())["final_step"] == steps


class SlowSink:
    """The run's own sink, after which a step takes long enough to be interrupted."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self._sink.log_metrics(metrics, step)
        if "train/loss" in metrics:
            time.sleep(SLOW_STEP_S)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sink, name)


def make_request(folder: Path, run: str, steps: int) -> Any:
    from layerplan.storage.working import find_working_folder
    from layerplan.tracking.tracker import NoopTracker, RunSinkFactory
    from tests.integration.test_train_resume import make_request as make_fixed

    request = make_fixed(folder, "quiet")
    run_dir = folder / run
    sinks = RunSinkFactory(run_dir / "metrics.jsonl", "train", NoopTracker())
    if "AWS_ENDPOINT_URL" in os.environ:
        run_dir = find_working_folder(f"s3://{BUCKET}", tempfile.gettempdir()) / run
        run_dir.mkdir(parents=True, exist_ok=True)
    update = {"num_cpus_per_worker": WORKER_CPUS, "max_steps": steps, "max_failures": 5}
    config = request.config.model_copy(update=update)
    return replace(request, run_dir=run_dir, config=config, sink_factory=lambda start: SlowSink(sinks(start)))


def main() -> None:
    import ray

    from layerplan.config.cluster import ClusterConfig
    from layerplan.ray_session import connect
    from layerplan.storage.mirror import fetch_folder
    from layerplan.storage.working import find_home
    from layerplan.train.trainer import run_training

    folder, run, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    connect(ClusterConfig(), min_cpus=2 * WORKER_CPUS)
    request = make_request(folder, run, steps)
    if find_home(request.run_dir) != request.run_dir:
        make_bucket()
    run_training(request)
    if find_home(request.run_dir) != request.run_dir:
        (request.run_dir / "ledger.jsonl").unlink(missing_ok=True)  # the bucket's is to be looked at
        fetch_folder(request.run_dir)
        shutil.copytree(request.run_dir, folder / run, dirs_exist_ok=True)
    ray.shutdown()


def make_bucket() -> None:
    from pyarrow.fs import S3FileSystem

    server = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    S3FileSystem(endpoint_override=server, scheme="http", allow_bucket_creation=True).create_dir(BUCKET)


if __name__ == "__main__":
    from layerplan.entry import run_guarded

    sys.exit(run_guarded(main))
