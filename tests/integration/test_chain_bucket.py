"""A run kept in a bucket, killed on one machine and finished on another that has nothing but the bucket."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerplan.pipeline.check_ledger import check_ledgers
from layerplan.storage.paths import BucketPath
from tests.buckets import BucketServer

START_TIMEOUT_S = 500
SECRET = "planted-secret-of-the-bucket"


@pytest.mark.long
def test_a_run_goes_on_from_its_bucket_alone(
    s3_server: BucketServer,
    finished_run: Path,
    tiny_config: Path,
    start_job: Callable[..., subprocess.Popen[str]],
    run_job: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in [*s3_server.keys.items(), s3_server.environment, ("AWS_SECRET_ACCESS_KEY", SECRET)]:
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "third"))
    s3_server.make("lake")
    run = BucketPath("s3://lake/deep/runs/quiet")

    def command(machine: str) -> tuple[object, ...]:
        values = {"storage_path": run.parent, "working_path": tmp_path / machine, "name": run.name}
        base = next((finished_run / "base_model" / "hf").iterdir())  # neither made nor measured a second time
        values |= {"model": f"{{type: pretrained, name: {base}}}"}
        values |= {"plan": f"{{type: file, path: {finished_run / 'freeze_plan.json'}}}"}
        values |= {"evaluation.backend": "transformers"}  # what an engine is told is another test's
        return "jobs/cpt.py", "--config", tiny_config, *(f"--set={key}={value}" for key, value in values.items())

    process = start_job(*command("first"))
    wait_for_seal(run / "checkpoints", process)
    os.killpg(process.pid, signal.SIGKILL)
    said = process.communicate()[0]
    assert not (run / "training.json").exists(), "the run was over before it could be killed"
    remove(tmp_path / "first")

    job = run_job(*command("second"))
    assert job.returncode == 0, job.output[-6000:]
    assert f"the run is kept at {run}" in job.output
    assert "step 1/40" not in job.output, "training began again from nothing"
    kept = {file.name: (run / file.name).read_bytes() for file in run.list_files()}
    for name in ("hf/step_00000040/model.safetensors", "ledger.jsonl"):
        assert kept[name] == (finished_run / name).read_bytes(), name
    expected = {"report.html", "verdicts.json", "self_test.json", "freeze_plan.json", "metrics.jsonl"}
    expected |= {"evaluation/base/ceval.json", "evaluation/step_00000040/ceval.json", "token_store/manifest.json"}
    expected |= {"export.json", "training.json", "checkpoints/step_00000040/seal.json", "tracking/lineage.jsonl"}
    assert expected <= kept.keys()
    assert not [name for name in kept if name.startswith("lease-") or name.endswith(".partial")]
    (tmp_path / "third").mkdir()
    check_ledgers([str(run)])
    assert "each exactly once" in capsys.readouterr().out

    here = tmp_path / "second"
    assert not list(here.rglob("checkpoints/step_*")) and not list(here.rglob("shard_*.parquet"))
    everything = [*kept.values(), *(file.read_bytes() for file in here.rglob("*") if file.is_file())]
    assert len(everything) > 60
    assert not any(SECRET.encode() in content for content in [*everything, said.encode(), job.output.encode()])
    check_lineage(next(here.rglob("mlflow.db")))


def check_lineage(database: Path) -> None:
    """The second machine's own store has the whole run, from what the bucket kept of the first machine's part."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{database}")
    (experiment,) = client.search_experiments(filter_string="name = 'layerplan'")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {"quiet", "self_test", "corpus", "plan", "train", "verdict"} <= runs.keys()
    points = client.get_metric_history(runs["train"].info.run_id, "train/loss")
    assert sorted(point.step for point in points) == [1, *range(5, 41, 5)], "a step is missing or logged twice"


def wait_for_seal(checkpoints: BucketPath, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0][-5000:]
        if any(file.name.endswith("/seal.json") for file in checkpoints.list_files()):
            return
        time.sleep(0.3)
    raise AssertionError("no checkpoint was sealed in time")


def remove(folder: Path) -> None:
    """Workers of a killed driver die a moment after it, and may write until then."""
    deadline = time.monotonic() + 20
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)
    assert not folder.exists()
