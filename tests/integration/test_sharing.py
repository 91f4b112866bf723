"""Runs that share a cluster of several nodes with labels: whose turn it is, and where workers and engines lie.

The file is also the program of each job: `python test_sharing.py WHAT ARGUMENT...` on the cluster of RAY_ADDRESS.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ray_script import run_script, start_script
from tests.tiny_store import make_inputs
from tests.worker_zygote import forked_workers

PATIENCE_S = 240
LARGE, SMALL = {"kind": "large"}, {"kind": "small"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A small node, and two large ones with room for three workers each."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    made = Cluster()
    try:
        with forked_workers():
            made.add_node(num_cpus=2, labels=SMALL, include_dashboard=True, dashboard_port=0)
            for _ in range(2):
                made.add_node(num_cpus=3, labels=LARGE)
        made.wait_for_nodes(timeout=120)
        yield made
    finally:
        made.shutdown()


class Job:
    """A process on the cluster, and what it says."""

    def __init__(self, folder: Path, name: str, what: str, *arguments: object, address: str) -> None:
        self.path = folder / f"{name}.txt"
        with self.path.open("w") as output:
            self.process = start_script(__file__, what, name, *arguments, output=output, RAY_ADDRESS=address)

    def said(self) -> str:
        return self.path.read_text()

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.said() or self.process.poll() is not None, self.said)
        assert text in self.said(), self.said()[-3000:]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def wait_until(is_true: Callable[[], bool], said: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline, said()[-3000:]
        time.sleep(0.2)


def test_runs_take_their_turn_by_priority_and_a_killed_one_leaves_the_line(cluster: Any, tmp_path: Path) -> None:
    jobs: dict[str, Job] = {}

    def start(name: str, what: str, *arguments: object) -> Job:
        jobs[name] = Job(tmp_path, name, what, *arguments, address=cluster.address)
        return jobs[name]

    try:
        foreign, first = start("foreign", "hog"), start("first", "hold", 0, 2, 2.0, "large")
        foreign.wait_for("holding")
        first.wait_for("started")
        urgent = start("urgent", "hold", 5, 2, 2.0, "large")
        urgent.wait_for("[queue] 1st of 1, behind first (priority 0), which has had its turn for")
        late, little = start("late", "hold", 0, 2, 2.0, "large"), start("little", "hold", 0, 1, 0.5, "large")
        late.wait_for("[queue] 2nd of 2, behind urgent (priority 5), which has waited")
        little.wait_for("started")  # it passes both: half a CPU is no use to who waits for whole ones
        line = next(line for line in late.said().splitlines() if "[queue] 2nd" in line)
        assert "and holds 4 CPU" in line and "(test_sharing.py, pid" in line and "has 2 CPU;" in line, line
        assert line.endswith("2 x thing of 2 CPU with kind=large"), line
        assert f"told: {line.partition('[queue] ')[2]}" in late.said().splitlines()
        assert "told: \n" in first.said(), "nothing is waited for once the turn has come"
        shown = show_queue(cluster.address)
        assert [name for word in shown.split() for name in jobs if word == name] == [
            "first",
            "little",
            "urgent",
            "late",
        ]
        assert "outside the queue: job" in shown
        urgent.kill()
        first.kill()
        late.wait_for("started")
        assert "[queue] its turn came after" in late.said()
        wait_until(lambda: "first" not in show_queue(cluster.address), late.said)
    finally:
        for job in jobs.values():
            job.kill()
    assert "no run of layerplan uses this cluster" in show_queue(cluster.address)


def show_queue(address: str) -> str:
    command = [sys.executable, "-m", "layerplan.cli", "cluster", "queue", "--address", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_each_replica_lies_on_one_node_and_engines_on_nodes_of_another_kind(cluster: Any, tmp_path: Path) -> None:
    done = run_script(__file__, "place", tmp_path, timeout_s=PATIENCE_S, RAY_ADDRESS=cluster.address)
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    first, second, third, fourth = found["ranks"]
    assert first == second != third == fourth, "Ray by itself would put three on one node"
    assert {first, third} == set(found["large"])
    assert found["engines"] == found["small"]


@pytest.mark.long
def test_training_and_scoring_beside_each_other_both_end(cluster: Any, tmp_path: Path, seed_model: str) -> None:
    make_inputs(tmp_path)
    training = Job(tmp_path, "training", "train", tmp_path, address=cluster.address)
    training.wait_for("started")
    scorings = [
        Job(tmp_path, f"scoring_{kind}", "score", tmp_path, seed_model, kind, address=cluster.address)
        for kind in ("large", "small")
    ]
    for job in (*scorings, training):
        assert job.process.wait(timeout=PATIENCE_S) == 0, job.said()[-3000:]
    beside, behind = scorings[1].said(), scorings[0].said()
    assert "[queue]" not in beside, "its own kind of node was free"
    assert "[queue] 1st of 1, behind training (priority 0), which has had its turn for" in behind
    assert "[queue] its turn came after" in behind
    ended = [float(job.said().split("ended at ")[1].split()[0]) for job in (training, *scorings)]
    assert ended[2] < ended[0] < ended[1], "beside it, training, and behind it"


class Thing:
    """An actor that only holds what it asked for."""

    def ready(self) -> None: ...


def hog(name: str) -> None:
    """A job of somebody else, on the small node."""
    import ray

    ray.init(log_to_driver=False)
    thing = ray.remote(num_cpus=2, label_selector=SMALL)(Thing).remote()
    ray.get(thing.ready.remote())
    print("holding", flush=True)
    time.sleep(PATIENCE_S)


def hold(name: str, priority: str, count: str, cpus: str, kind: str) -> None:
    """Waits for its turn, and holds what it asked for until it is killed."""
    import ray

    from layerplan.config.cluster import ClusterConfig
    from layerplan.ray_session import connect
    from layerplan.sharing.demand import Demand
    from layerplan.sharing.turn import holding_turn

    config = ClusterConfig(priority=int(priority))
    connect(config, min_cpus=1)
    wanted = Demand(what="thing", field="x", count=int(count), resources={"CPU": float(cpus)}, labels={"kind": kind})
    with holding_turn(config, name, [wanted], tell=lambda line: print(f"told: {line}", flush=True)):
        made = ray.remote(num_cpus=float(cpus), label_selector={"kind": kind})(Thing)
        things = [made.remote() for _ in range(int(count))]
        ray.get([thing.ready.remote() for thing in things])
        print("started", flush=True)
        time.sleep(PATIENCE_S)


def place(folder: str) -> None:
    """Starts four workers in two replicas, and engines, and writes which nodes they are on."""
    import ray

    from layerplan.actor_pool import ActorPool, map_over_actors
    from layerplan.config.cluster import ClusterConfig
    from layerplan.config.train import TrainConfig
    from layerplan.ray_session import connect
    from layerplan.train.ray_trainer import deciding_anew, make_torch_trainer

    connect(ClusterConfig(), min_cpus=1)
    train = TrainConfig(
        num_workers=4,
        num_cpus_per_worker=1.0,
        global_batch_size=4,
        num_replicas=2,
        parallelism="shard",
        placement="strict_pack",
        labels=LARGE,
    )
    trainer = make_torch_trainer(
        _write_node, {"folder": folder}, train, name="ray", folder=Path(folder), max_failures=0, env={}
    )
    with deciding_anew(train):
        assert trainer.fit().error is None
    pool = ActorPool(2, 1.0, labels=SMALL)
    rows = [{"number": number} for number in range(4)]
    engines = {str(row["node"]) for row in map_over_actors(pool, NodeTeller, (), rows, take="rows")}
    nodes = {
        kind: [node["NodeID"] for node in ray.nodes() if node["Labels"].get("kind") == kind]
        for kind in ("large", "small")
    }
    ranks = [(Path(folder) / f"rank_{rank}").read_text() for rank in range(4)]
    (Path(folder) / "found.json").write_text(json.dumps({"ranks": ranks, "engines": sorted(engines), **nodes}))


class NodeTeller:
    """An actor that says where it is."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import ray

        return {"node": [ray.get_runtime_context().get_node_id()] * len(batch["number"])}


def _write_node(loop_config: dict[str, Any]) -> None:
    import ray
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    (Path(loop_config["folder"]) / f"rank_{rank}").write_text(ray.get_runtime_context().get_node_id())


def train(name: str, folder: str) -> None:
    """Trains on both large nodes, a worker of two CPUs on each."""
    from layerplan.config.run import RunConfig
    from layerplan.pipeline.demands import ask_for_training
    from layerplan.pipeline.session import on_cluster
    from layerplan.train.trainer import run_training
    from tests.integration.test_train_resume import make_request

    request = make_request(Path(folder), "quiet")
    wanted = request.config.model_copy(update={"num_cpus_per_worker": 2.0, "labels": LARGE, "max_steps": 40})
    config = RunConfig.model_validate(
        {"name": name, "model": {"type": "pretrained", "name": "base"}, "train": wanted.model_dump()}
    )
    with on_cluster(config, ask_for_training(config)):
        print("started", flush=True)
        request.run_dir.mkdir(exist_ok=True)
        run_training(request.__class__(**{**vars(request), "config": wanted}))
        print(f"ended at {time.time()}", flush=True)


def score(name: str, folder: str, model: str, kind: str) -> None:
    """Scores a model by itself, as `layerplan evaluate` does."""
    from layerplan.config.run import RunConfig
    from layerplan.models.ref import ModelRef
    from layerplan.pipeline.evaluate import score_model

    evaluation = {
        "backend": "transformers",
        "num_cpus_per_actor": 2.0,
        "labels": {"kind": kind},
        "protocols": ["logit"],
    }
    values = {
        "name": name,
        "storage_path": folder,
        "model": {"type": "pretrained", "name": model},
        "evaluation": evaluation,
    }
    score_model(RunConfig.model_validate(values), ModelRef(model), Path(folder) / name)
    print(f"ended at {time.time()}", flush=True)


if __name__ == "__main__":
    from layerplan.entry import run_guarded

    what, *words = sys.argv[1:]
    jobs: dict[str, Callable[..., None]] = {
        "hog": hog,
        "hold": hold,
        "place": place,
        "train": train,
        "score": score,
    }
    sys.exit(run_guarded(lambda: jobs[what](*words)))
