"""SIGKILL to the driver after its first checkpoint; the same command finishes the run as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

START_TIMEOUT_S = 500


@pytest.mark.long
def test_a_killed_run_ends_with_the_weights_and_the_lineage_of_a_quiet_one(
    finished_run: Path,
    tiny_config: Path,
    shared_cluster: dict[str, str],
    start_job: Callable[..., subprocess.Popen[str]],
    run_job: Callable[..., Any],
) -> None:
    storage = finished_run.parent
    command = ("jobs/cpt.py", "--config", tiny_config, "--set", f"storage_path={storage}", "--set", "name=killed")
    command += ("--set", "evaluation.evaluate_base=false")
    run = storage / "killed"
    run.mkdir()
    shutil.copytree(finished_run / "base_model", run / "base_model")  # made and measured for other tests
    for name in ("layer_profile.json", "layer_probes.parquet"):
        shutil.copy(finished_run / name, run)
    process = start_job(*command, env=shared_cluster)
    wait_for_committed_checkpoint(run / "checkpoints", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "training.json").exists(), "the run was over before it could be killed"
    runs_before = json.loads((run / "mlflow_runs.json").read_text())
    wait_for_silence(run)

    job = run_job(*command, env=shared_cluster)
    assert job.returncode == 0, job.output[-6000:]
    assert f"found {run / 'base_model'}" in job.output, "the base was made a second time"
    assert "step 1/40" not in job.output, "training began again from nothing"
    runs_after = json.loads((run / "mlflow_runs.json").read_text())
    assert {key: runs_after[key] for key in runs_before} == runs_before
    assert (run / "hf/step_00000040/model.safetensors").read_bytes() == (
        finished_run / "hf/step_00000040/model.safetensors"
    ).read_bytes()
    assert losses(run) == losses(finished_run)
    assert (run / "ledger.jsonl").read_text() == (finished_run / "ledger.jsonl").read_text()

    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{storage / 'mlflow.db'}")
    assert client.get_run(runs_after["parent"]).info.status == "FINISHED"
    points = client.get_metric_history(runs_after["train"], "train/loss")
    assert sorted(point.step for point in points) == [1, *range(5, 41, 5)], "a step is missing or logged twice"


def wait_for_committed_checkpoint(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0][-5000:]
        if any("step_" in path.read_text() for path in folder.glob("checkpoint_manager_snapshot.json")):
            return
        time.sleep(0.005)
    raise AssertionError("no checkpoint was committed in time")


def wait_for_silence(run: Path) -> None:
    """Workers of a killed driver die a moment after it."""
    previous: dict[str, float] = {}
    for _ in range(60):
        now = {str(path): path.stat().st_mtime for path in run.rglob("*") if path.exists()}
        if now == previous:
            return
        previous = now
        time.sleep(1.5)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if line["run"] == "train" and "train/loss" in line}
