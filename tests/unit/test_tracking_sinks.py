"""The lineage: nested runs that a real MLflow client reads back, and metrics without a step twice."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from layerplan.config.tracking import TrackingConfig
from layerplan.errors import TrackingError
from layerplan.tracking.jsonl import JsonlSink, read_metrics
from layerplan.tracking.tracker import NoopTracker, RunSinkFactory, open_tracker


def test_a_resume_drops_the_lines_of_the_attempt_that_was_lost(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    other = JsonlSink(path, "base_model", 0)
    other.log_metrics({"train/loss": 9.0}, 7)
    sink = JsonlSink(path, "train", 0)
    for step in (1, 2, 3):
        sink.log_metrics({"train/loss": float(step)}, step)
    with path.open("a") as handle:
        handle.write('{"run": "train", "st')
    again = JsonlSink(path, "train", 2)
    again.log_metrics({"train/loss": 3.5}, 3)
    assert [(line["run"], line["step"]) for line in read_metrics(path)] == [
        ("base_model", 7),
        ("train", 1),
        ("train", 2),
        ("train", 3),
    ]


def test_a_killed_and_resubmitted_run_continues_in_the_same_mlflow_run(tmp_path: Path):
    import mlflow

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    ids = []
    for start_step in (0, 2):
        parent = open_tracker(TrackingConfig(), run_dir, "run")
        stage = parent.child("train")
        factory = pickle.loads(pickle.dumps(RunSinkFactory(run_dir / "metrics.jsonl", "train", stage)))
        sink = factory(start_step)
        for step in range(start_step + 1, start_step + 4):
            sink.log_metrics({"train/loss": 10.0 - step}, step)
        sink.close()
        parent.log_params({"plan": "full", "other": start_step})
        stage.close()
        parent.close()
        ids.append((parent.run_id, stage.run_id))
    assert ids[0] == ids[1]
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    history = client.get_metric_history(ids[0][1], "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 10.0 - step) for step in range(1, 6)]
    nested = client.get_run(ids[0][1])
    assert nested.data.tags["mlflow.parentRunId"] == ids[0][0] and nested.info.status == "FINISHED"
    assert client.get_run(ids[0][0]).data.params == {"plan": "full", "other": "0"}


def test_points_a_killed_attempt_still_held_reach_the_store(tmp_path: Path):
    """The first attempt is never closed, as after SIGKILL; MLflow gets its points from metrics.jsonl."""
    import mlflow

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    stage = open_tracker(TrackingConfig(), run_dir, "run").child("train")
    factory = RunSinkFactory(run_dir / "metrics.jsonl", "train", stage)
    killed = factory(0)
    for step in (1, 2, 3):
        killed.log_metrics({"train/loss": 10.0 - step}, step)
    again = factory(2)
    again.log_metrics({"train/loss": 6.5}, 3)
    again.close()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    history = client.get_metric_history(stage.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 9.0), (2, 8.0), (3, 6.5)]


def test_artifacts_lie_beside_the_store(tmp_path: Path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "plan.json").write_text("{}")
    tracker = open_tracker(TrackingConfig(), run_dir, "run")
    tracker.log_artifact(run_dir / "plan.json")
    assert list((tmp_path / "mlartifacts").rglob("plan.json"))


def test_an_unreachable_store_is_one_clear_error(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrackingError, match=r"tracking\.uri=sqlite:///"):
        open_tracker(TrackingConfig(uri=f"sqlite:///{tmp_path}/file/x.db"), tmp_path, "run")


def test_a_deleted_experiment_is_named_with_the_way_to_restore_it(tmp_path: Path):
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    number = client.create_experiment("layerplan", artifact_location=tmp_path.as_uri())
    client.delete_experiment(number)
    with pytest.raises(TrackingError) as caught:
        open_tracker(TrackingConfig(uri=uri), tmp_path, "run")
    words = str(caught.value)
    assert words.startswith("tracking.experiment=layerplan: was deleted in sqlite:///") and "\n" not in words
    assert f"mlflow experiments restore --experiment-id {number}`, or set tracking.experiment to another name" in words
    client.restore_experiment(number)
    open_tracker(TrackingConfig(uri=uri), tmp_path, "run").close()


def test_no_backend_keeps_nothing(tmp_path: Path):
    tracker = open_tracker(TrackingConfig(backend="jsonl"), tmp_path, "run")
    assert isinstance(tracker.child("x"), NoopTracker) and tracker.make_sink_factory() is None


def test_a_worker_that_logs_nothing_does_not_import_mlflow(tmp_path: Path):
    config = TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    factory = RunSinkFactory(tmp_path / "metrics.jsonl", "train", open_tracker(config, tmp_path, "run"))
    (tmp_path / "factory").write_bytes(pickle.dumps(factory))
    load = f"import pickle, sys; pickle.load(open({str(tmp_path / 'factory')!r}, 'rb')); print('mlflow' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", load], text=True).strip() == "False"


def test_what_drives_a_training_does_not_import_model_code():
    load = "import layerplan.train.trainer, sys; print({'transformers', 'layerplan.train.worker'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", load], text=True).strip() == "set()"
