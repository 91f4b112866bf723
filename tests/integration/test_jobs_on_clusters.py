"""Jobs on clusters that are there before them: a training over two Ray nodes, their check, and a job that is submitted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from layerplan.ray_session import find_free_port
from tests.planted import MARK, PLANTED, find_files_with
from tests.sockets import find_open, watch_listening
from tests.worker_zygote import forked_workers

ROOT = Path(__file__).resolve().parents[2]
RunJob = Callable[..., Any]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def two_nodes() -> Iterator[dict[str, str]]:
    """Two Ray nodes of two CPUs each on this machine; yields what a job needs to reach them."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    port = find_free_port()
    cluster = Cluster()
    try:
        with forked_workers():
            for node in ({"include_dashboard": True, "dashboard_port": port}, {}):
                # Ray gives a node 30 s to start, which a busy machine may need twice
                try:
                    cluster.add_node(num_cpus=2, **node)
                except Exception as error:
                    if "timed out during startup" not in str(error):
                        raise
                    cluster.add_node(num_cpus=2, **node)
        cluster.wait_for_nodes(timeout=120)
        yield {"RAY_ADDRESS": cluster.address}
    finally:
        cluster.shutdown()


@pytest.fixture
def config(seed_model: str, write_pretrained_config: Callable[..., Path]) -> Path:
    """The tiny config on an existing model."""
    return write_pretrained_config(seed_model)


def settings(**values: object) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def test_training_spans_two_ray_nodes(
    config: Path, two_nodes: dict[str, str], tmp_path: Path, run_job: RunJob, seed_model: str
) -> None:
    """1.5 CPUs a worker on nodes of two: the workers cannot share a node."""
    arguments = settings(
        storage_path=tmp_path, name="wide", **{"train.num_cpus_per_worker": 1.5, "tracking.backend": "none"}
    )
    job = run_job("jobs/cpt.py", "--config", config, *arguments, env=two_nodes)
    assert job.returncode == 0, job.output[-5000:]
    assert "[train] workers: 2 on 2 Ray nodes" in job.output
    assert read(tmp_path / "wide" / "training.json")["final_step"] == 6
    assert read(tmp_path / "wide" / "export.json")["frozen_tensors_identical_to_base"] > 0
    assert read(tmp_path / "wide" / "freeze_plan.json")["model"]["name"] == Path(seed_model).name


def test_two_ray_nodes_are_checked_and_what_fails_is_told_with_its_remedy(
    two_nodes: dict[str, str], tmp_path: Path, run_job: RunJob
) -> None:
    out = tmp_path / "checked.json"
    job = run_job("jobs/check_cluster.py", "--storage", tmp_path, "--min-nodes", 2, "--out", out, env=two_nodes)
    lines = [line for line in job.output.splitlines() if line.startswith(("ok  ", "FAIL  "))]
    failed = [
        line for line in lines if line.startswith("FAIL  ") and not line.startswith(("FAIL  space", "FAIL  node "))
    ]
    assert not failed, job.output
    for wanted in ("nodes", "versions", "clocks", f"storage {tmp_path}", "ports", "all-reduce over all"):
        assert sum(line[6:].startswith(wanted) for line in lines) == 1, job.output
    checked = read(out)
    labels = {node["label"] for node in checked["nodes"]}
    assert len(labels) == 2
    (pair,) = checked["all_reduce_bytes_per_s"]["pairs"]
    assert set(pair["nodes"]) == labels
    assert pair["rate"] == checked["all_reduce_bytes_per_s"]["over_all"] > 1e6
    assert checked["core_flops_per_s"] > 1e9 and checked["storage_bytes_per_s"] > 1e6
    assert list(tmp_path.iterdir()) == [out]  # what was written to try the storage is gone
    job = run_job("jobs/check_cluster.py", "--storage", "/proc/layerplan", "--min-nodes", 3, env=two_nodes)
    assert job.returncode == 1
    assert "3 are wanted: start `ray start --address` on the others" in job.output
    assert "storage /proc/layerplan: name a folder or bucket that every node may write to" in job.output


def test_a_job_is_submitted_to_a_cluster_made_for_it(config: Path, tmp_path: Path) -> None:
    """`make demo`'s script: it starts a closed cluster, submits, shows the end and no secret, and stops it all."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    fewer = {"train.num_cpus_per_worker": 0.25, "train.num_workers": 1, "evaluation.evaluate_base": "false"}
    demo = subprocess.Popen(
        ["bash", "cluster/local/demo.sh", *settings(name="submitted", **fewer)],
        env=env | PLANTED | {"VENV": sys.prefix, "RUNS": str(tmp_path), "CONFIG": str(config)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with watch_listening(demo.pid) as listening:
        output, errors = demo.communicate(timeout=800)
    assert demo.returncode == 0, output[-5000:] + errors[-2000:]
    assert f"report    {tmp_path / 'submitted' / 'report.html'}" in output
    assert (tmp_path / "submitted" / "report.html").is_file()
    assert "make ui" in output
    assert "raylet" in {name for name, _ in listening} and find_open(listening) == set()
    assert find_files_with(MARK, tmp_path) == [] and MARK not in output + errors
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout
    assert left == "", "a process of the job is left"
