"""A sweep whose worker and whose driver are killed: every trial once, resources free again, what grew is added."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import SHARED_CPUS

STEPS = 12
NAMES = {f"boundary_{boundary:02d}{side}" for boundary in (1, 2, 3) for side in ("", "_shallow")}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, corpus_source: dict[str, object], four_layers: str) -> Path:
    """A base of four layers and six trials of it."""
    folder = tmp_path_factory.mktemp("sweep")
    train = {"max_steps": STEPS, "global_batch_size": 4, "num_workers": 1, "compute_dtype": "float32"}
    train |= {"log_every_steps": 4, "checkpoint_every_steps": 2, "validate_every_steps": 4, "write_ledger": True}
    values = {
        "name": "killed",
        "storage_path": str(folder),
        "model": {"type": "pretrained", "name": four_layers},
        "corpus": {"seq_len": 64, "rows_per_group": 2, "validation_rows": 12, "sources": [corpus_source]},
        "train": train | {"optimizer": {"learning_rate": 1e-3}},
        "evaluation": {
            "held_out": [{"name": "python", "source": {"path": "machine://docs/python", "max_documents": 4}}]
        },
        "sweep": {"boundaries": [1, 2, 3], "freeze": ["deep", "shallow"], "max_steps": STEPS},
    }
    values["sweep"]["max_concurrent_trials"] = 2
    values["evaluation"]["held_out"][0]["max_chars"] = 400
    (folder / "sweep.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "sweep.yaml"


@pytest.mark.long
def test_six_trials_survive_a_killed_worker_and_a_killed_driver(
    config: Path,
    shared_cluster: dict[str, str],
    start_job: Callable[..., subprocess.Popen[str]],
    run_here: Callable[..., Any],
) -> None:
    import mlflow

    sweep = config.parent / "killed" / "sweep"
    command = ("jobs/sweep_boundary.py", "--config", config)
    process = start_job(*command, env=shared_cluster)
    wait_for(process, lambda: list(sweep.glob("boundary_*/reports.jsonl")))
    os.kill(find_worker(), signal.SIGKILL)
    wait_for(process, lambda: len(list(sweep.glob("boundary_*/trial.json"))) >= 2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert_all_free(within_s=60)
    done = {path: path.read_bytes() for path in sweep.glob("boundary_*/trial.json")}
    assert 2 <= len(done) < 6, "the sweep was over before it could be killed"

    job = run_here(*command)
    assert job.returncode == 0, job.output[-6000:]
    assert_all_free(within_s=60)
    assert {path.parent.name for path in sweep.glob("boundary_*/trial.json")} == NAMES
    assert {path: path.read_bytes() for path in done} == done, "a trial that had ended was run again"
    for name in NAMES:
        steps = [json.loads(line)["step"] for line in (sweep / name / "ledger.jsonl").read_text().splitlines()]
        assert steps == list(range(1, STEPS + 1)), f"{name}: a step is missing or there twice"
    results = json.loads((sweep / "results.json").read_text())
    assert [item["name"] for item in results] == sorted(NAMES, key=lambda name: (read(sweep / name)["loss"], name))
    assert all(item["text_losses"].keys() == {"python"} for item in results)
    chosen = json.loads((sweep / "chosen.json").read_text())
    assert chosen["trial"] == results[0]["name"]
    assert [path.parent.name for path in sweep.glob("*/hf")] == [chosen["trial"]], "only the best is exported"
    assert "<h2>The sweep</h2>" in (sweep.parent / "report.html").read_text(encoding="utf-8")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{config.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("layerplan")
    runs = client.search_runs([experiment.experiment_id])
    trials = [run for run in runs if run.data.tags.get("layerplan.stage", "").startswith("sweep_boundary")]
    assert len(trials) == 6 and {run.info.status for run in trials} == {"FINISHED"}
    for run in trials:
        points = client.get_metric_history(run.info.run_id, "train/loss")
        assert sorted(point.step for point in points) == [1, 4, 8, 12], "a step is missing or logged twice"


@pytest.mark.long
def test_a_space_that_grows_runs_what_is_new_under_asha(config: Path, run_here: Callable[..., Any]) -> None:
    """After the test before: six trials have ended, and judge the new ones by what they reported."""
    sweep = config.parent / "killed" / "sweep"
    done = {path: path.read_bytes() for path in sweep.glob("boundary_*/trial.json")}
    arguments = [
        f"sweep.{each}"
        for each in (
            "scheduler=asha",
            "seeds=[0, 1]",
            "boundaries=[1]",
            "reduction_factor=2",
            "max_concurrent_trials=1",
        )
    ]
    job = run_here(
        "jobs/sweep_boundary.py", "--config", config, *(part for each in arguments for part in ("--set", each))
    )
    assert job.returncode == 0, job.output[-6000:]
    assert {path: path.read_bytes() for path in done} == done
    added = {path.parent.name for path in sweep.glob("boundary_*/trial.json")} - NAMES
    assert added == {"boundary_01_seed1", "boundary_01_shallow_seed1"}
    assert_all_free(within_s=60)


def find_worker() -> int:
    """Process id of a training worker of the cluster at hand."""
    import ray
    from ray.util.state import list_actors

    found = list_actors(
        ray.get_runtime_context().gcs_address, filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
    )
    assert found, "no training worker was found"
    return int(found[0].pid)


def wait_for(process: subprocess.Popen[str], condition: Callable[[], object], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[0][-6000:]
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.02)


def assert_all_free(*, within_s: float) -> None:
    import ray

    deadline = time.monotonic() + within_s
    while (free := ray.available_resources().get("CPU", 0.0)) < SHARED_CPUS:
        assert time.monotonic() < deadline, f"{free} of {SHARED_CPUS} CPUs are free; {list_holders()}"
        time.sleep(0.2)


def list_holders() -> str:
    """Who may hold resources of the cluster at hand."""
    import ray
    from ray.util.state import list_actors, list_placement_groups, list_tasks

    address, ended = ray.get_runtime_context().gcs_address, ("DEAD", "REMOVED", "FINISHED", "FAILED")
    found = list_actors(address), list_placement_groups(address, detail=True), list_tasks(address)
    actors = [(item.class_name, item.pid, item.job_id, item.state) for item in found[0] if item.state not in ended]
    groups = [item for item in found[1] if item.state not in ended]
    tasks = [(item.name, item.job_id, item.state) for item in found[2] if item.state not in ended]
    return f"actors {actors}, placement groups {groups}, tasks {tasks}"


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "trial.json").read_text()))
