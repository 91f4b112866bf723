"""A run whose nodes leave and join while it trains ends on the same rows and, to rounding, the same losses.

The file is also the program the test starts: `python test_elastic.py FOLDER RUN...` trains the named runs on the cluster of
RAY_ADDRESS.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from layerplan.artifacts import read_lines
from tests.ray_script import run_script, start_script
from tests.tiny_store import make_inputs
from tests.worker_zygote import forked_workers

MAX_STEPS = 40
BATCH = 5
"""Rows of a step: two workers have three and two of them."""
PATIENCE_S = 300


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head and a node, each with room for one worker."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    made = Cluster()
    try:
        with forked_workers():
            made.add_node(num_cpus=1, include_dashboard=True, dashboard_port=0)
            made.add_node(num_cpus=1)
        made.wait_for_nodes(timeout=120)
        yield made
    finally:
        made.shutdown()


@pytest.mark.long
def test_a_node_leaves_and_another_joins_and_the_rows_stay_the_same(cluster: Any, tmp_path: Path) -> None:
    make_inputs(tmp_path)
    env = {"RAY_ADDRESS": cluster.address}
    run = tmp_path / "elastic"
    with (tmp_path / "said.txt").open("w") as output:
        training = start_script(__file__, tmp_path, "elastic", output=output, **env)
    said = (tmp_path / "said.txt").read_text
    try:
        wait_for(lambda: find_step(run, workers=2) >= 8, training, said)
        cluster.remove_node(sorted(cluster.worker_nodes, key=str)[-1], allow_graceful=False)
        wait_for(lambda: find_step(run, workers=1) >= 1, training, said)
        with forked_workers():
            cluster.add_node(num_cpus=1)
        wait_for(lambda: find_step(run, workers=2) == MAX_STEPS, training, said)
        assert training.wait(timeout=PATIENCE_S) == 0, said()[-5000:]
    finally:
        training.kill()
    quiet = run_script(__file__, tmp_path, "quiet", timeout_s=PATIENCE_S, **env)
    assert quiet.returncode == 0, quiet.stdout[-5000:]
    ledgers = [(tmp_path / name / "ledger.jsonl").read_text() for name in ("elastic", "quiet")]
    assert ledgers[0] == ledgers[1] and len(ledgers[0].splitlines()) == MAX_STEPS
    losses = [list_losses(tmp_path / name) for name in ("elastic", "quiet")]
    assert losses[0].keys() == losses[1].keys() == {*range(1, MAX_STEPS + 1)}
    assert list(losses[0].values()) == pytest.approx(list(losses[1].values()), rel=1e-3)
    result = json.loads((run / "training.json").read_text())
    (_, first), (shrunk, one), (grown, last) = result["worlds"]
    assert (first, one, last) == (2, 1, 2) and 0 < shrunk < grown < MAX_STEPS
    assert shrunk % 2 == grown % 2 == 0, "from a checkpoint on"
    events = [line for line in read_lines(run / "metrics.jsonl") if line.get("event") == "world_change"]
    assert {line["message"] for line in events} >= {
        f"1 worker from step {shrunk + 1} on, 2 until then",
        f"2 workers from step {grown + 1} on, 1 until then",
    }
    assert said().count(f"2 workers from step {grown + 1} on, 1 until then") == 1, "told once, by rank 0"


def wait_for(is_true: Callable[[], bool], training: Any, said: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert training.poll() in (None, 0), said()[-5000:]
        assert time.monotonic() < deadline, said()[-5000:]
        time.sleep(0.2)


def find_step(run: Path, *, workers: int) -> int:
    """The newest logged step, when so many workers took it; else -1."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if "train/loss" in line]
    return int(lines[-1]["step"]) if lines and lines[-1]["train/workers"] == workers else -1


def list_losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_lines(run / "metrics.jsonl") if "train/loss" in line}


@dataclass
class WaitingSink:
    """The run's own sink, slowed down so that nodes have time to go and come; one worker waits for what comes next."""

    run_dir: Path
    sink: Any

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.sink.log_metrics(metrics, step)
        if "train/loss" not in metrics:
            return
        time.sleep(0.2)
        while metrics["train/workers"] == 1 and step >= MAX_STEPS // 2:
            time.sleep(0.2)

    def log_event(self, name: str, step: int, message: str) -> None:
        self.sink.log_event(name, step, message)

    def drop_after(self, step: int) -> None:
        self.sink.drop_after(step)

    def close(self) -> None:
        self.sink.close()


def make_request(folder: Path, run: str) -> Any:
    from layerplan.config.train import WorkerRange
    from layerplan.tracking.tracker import NoopTracker, RunSinkFactory
    from tests.integration.test_train_resume import make_request as make_fixed

    request = make_fixed(folder, "quiet")
    run_dir = folder / run
    sinks = RunSinkFactory(run_dir / "metrics.jsonl", "train", NoopTracker())
    workers = WorkerRange(min=1, max=2, resize_every=1) if run == "elastic" else 1
    update = {"num_workers": workers, "num_cpus_per_worker": 1.0, "global_batch_size": BATCH, "max_steps": MAX_STEPS}
    if run == "elastic":
        update["micro_batch_size"] = "auto"
    config = request.config.model_copy(update=update)
    waiting = (lambda start: WaitingSink(run_dir, sinks(start))) if run == "elastic" else sinks
    return replace(request, run_dir=run_dir, config=config, sink_factory=waiting)


def main() -> None:
    import ray

    from layerplan.config.cluster import ClusterConfig
    from layerplan.ray_session import connect
    from layerplan.train.trainer import run_training

    folder = Path(sys.argv[1])
    connect(ClusterConfig(), min_cpus=1)
    for run in sys.argv[2:]:
        run_training(make_request(folder, run))
    ray.shutdown()


if __name__ == "__main__":
    from layerplan.entry import run_guarded

    sys.exit(run_guarded(main))
