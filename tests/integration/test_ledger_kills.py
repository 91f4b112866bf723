"""One run loses a worker, its driver and a Ray node, on 2, 1 and 4 workers, and its ledger is that of the schedule.

The file is also the program the test starts: `python test_ledger_kills.py FOLDER WORKERS ACCIDENT STEP` trains on the
cluster of RAY_ADDRESS until its end or its accident.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ray_script import start_script
from tests.worker_zygote import forked_workers

MAX_STEPS = 48
STEP_S = 0.1
TIMEOUT_S = 400


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head of two CPUs; nodes come and go."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # without a dashboard Ray Train leaks the placement group of a driver that was killed
    head = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": port}
    with forked_workers():
        made = Cluster(initialize_head=True, head_node_args=head)
        yield made
        made.shutdown()


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_ledger_survives_every_kill_and_change_of_workers(cluster: Any, tmp_path: Path) -> None:
    """Kills fall on steps drawn anew each time; the steps are in the message of a failure."""
    kills = [random.SystemRandom().randrange(low, low + 6) for low in (3, 12, 22)]
    run = tmp_path / "run"
    killed = start(cluster, tmp_path, 2, "driver", kills[0])
    assert wait(killed) == -signal.SIGKILL, kills
    node = cluster.add_node(num_cpus=3)
    losing = start(cluster, tmp_path, 1, "worker", kills[1])
    wait_for_step(run / "ledger.jsonl", kills[2], losing)
    assert (run / "worker.done").exists(), "the worker was never killed"
    cluster.remove_node(node, allow_graceful=False)
    assert wait(losing) > 0, "the second failure of the run is one more than it may have"
    cluster.add_node(num_cpus=3)
    assert wait(start(cluster, tmp_path, 4)) == 0, kills

    from layerplan.corpus.manifest import Manifest
    from layerplan.corpus.stream import make_schedule
    from layerplan.train.ledger_check import check_epochs, load_ledger

    steps = load_ledger(run)
    schedule = make_schedule(tmp_path / "store", num_lanes=4, seed=0)
    assert [step.row_ids for step in steps] == [
        tuple(np.sort(schedule.rows_at(step)).tolist()) for step in range(MAX_STEPS)
    ], kills
    (proof,) = check_epochs(steps, Manifest.load(tmp_path / "store"))
    assert (proof.full_epochs, proof.rows_in_open_epoch) == (3, 0), "64 rows, 48 steps of 4"
    assert json.loads((run / "training.json").read_text())["final_step"] == MAX_STEPS


def start(cluster: Any, folder: Path, workers: int, accident: str = "none", step: int = 0) -> subprocess.Popen[str]:
    with (folder / f"output_{workers}.txt").open("w") as output:
        return start_script(__file__, folder, workers, accident, step, output=output, RAY_ADDRESS=cluster.address)


def wait(process: subprocess.Popen[str]) -> int:
    try:
        return process.wait(timeout=TIMEOUT_S)
    finally:
        process.kill()


def wait_for_step(ledger: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "training was over before its node could be killed"
        if len(ledger.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in time")


@dataclass
class AccidentSink:
    """Slows rank 0 down to a pace at which a kill can hit a step, and kills at one."""

    run: Path
    accident: str
    at: int
    driver: int

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if "train/loss" not in metrics:
            return
        time.sleep(STEP_S)
        marker = self.run / "worker.done"
        if self.accident == "worker" and step == self.at and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.accident == "driver" and step >= self.at:
            os.kill(self.driver, signal.SIGKILL)
            time.sleep(5)

    def log_event(self, name: str, step: int, message: str) -> None: ...

    def close(self) -> None: ...


def main() -> None:
    import ray
    from test_train_resume import make_request

    from layerplan.config.cluster import ClusterConfig
    from layerplan.ray_session import connect
    from layerplan.train.trainer import run_training
    from tests.tiny_store import make_inputs

    folder, workers, accident, at = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    if not (folder / "store").exists():
        make_inputs(folder)
    connect(ClusterConfig(), min_cpus=1)
    run, driver = folder / "run", os.getpid()
    request = make_request(folder, "run")
    # one worker asks for more than the head has, so that it goes to the node that will be lost
    update = {"max_steps": MAX_STEPS, "num_workers": workers, "num_cpus_per_worker": 2.5 if workers == 1 else 0.75}
    config = request.config.model_copy(update=update | {"validate_every_steps": 99, "max_failures": 1})
    run_training(replace(request, config=config, sink_factory=lambda step: AccidentSink(run, accident, at, driver)))
    ray.shutdown()


if __name__ == "__main__":
    from layerplan.entry import run_guarded

    sys.exit(run_guarded(main))
