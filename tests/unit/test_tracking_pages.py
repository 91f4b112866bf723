"""What people meet in MLflow: the experiment's kind, a run's settings, corpus, description and address, and how runs end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from layerplan.config.load import dump_config, validate_config
from layerplan.config.plan import FreezeDeepPlanConfig, PlanOptions
from layerplan.errors import TrainingError
from layerplan.pipeline.lineage import list_params, note_config
from layerplan.pipeline.trial_runs import TrialRuns, closing_runs
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.sweep.objective import Trial
from layerplan.sweep.space import Point
from layerplan.tracking.address import describe_address, find_table, list_addresses
from layerplan.tracking.outbox import PARENT, Outbox, OutboxTracker, TrackingFolder
from layerplan.tracking.position import count_backlog
from layerplan.tracking.tracker import NOTE_TAG, RUN_ID, Dataset
from layerplan.train.trial_record import load_record, load_records
from tests.mlflow_server import carry, open_stage
from tests.qwen3 import QWEN3_0P6B, QWEN3_0P6B_IDENTITY

SECRET = "hunter2-open-sesame"
KIND = "mlflow.experimentKind"


def open_parent(run_dir: Path) -> OutboxTracker:
    return OutboxTracker(Outbox(TrackingFolder(run_dir)), PARENT, run_dir.name)


def get_run(client: Any, run_dir: Path, stage: str = PARENT) -> Any:
    return client.get_run(json.loads((run_dir / "mlflow_runs.json").read_text())[stage])


def test_an_experiment_says_that_models_are_trained_in_it(run_dir: Path, uri: str, client: Any) -> None:
    """Else MLflow 3 opens it on the overview of GenAI traces."""
    open_parent(run_dir)
    assert carry(run_dir, uri) == []
    assert client.get_experiment_by_name("layerplan").tags[KIND] == "custom_model_development"


@pytest.mark.parametrize(
    ("there", "then"),
    [
        (None, "custom_model_development"),
        ("genai_development_inferred", "custom_model_development"),
        ("no_inferred_type", "custom_model_development"),
        ("finetuning", "finetuning"),
    ],
)
def test_the_kind_of_an_older_experiment_replaces_a_guess_and_no_choice(
    run_dir: Path, uri: str, client: Any, there: str | None, then: str
) -> None:
    client.create_experiment("layerplan", tags={} if there is None else {KIND: there})
    open_parent(run_dir)
    assert carry(run_dir, uri) == []
    assert client.get_experiment_by_name("layerplan").tags[KIND] == then


def test_every_setting_is_a_parameter_of_the_parent(run_dir: Path, uri: str, client: Any) -> None:
    sources = [{"path": f"/data/part_{number:03d}.jsonl"} for number in range(40)]
    config = validate_config(
        {
            "name": "run",
            "model": {"type": "pretrained", "name": "m"},
            "corpus": {"sources": sources},
            "train": {"max_steps": 321, "optimizer": {"learning_rate": 3e-5}},
            "tracking": {"uri": f"http://anna:{SECRET}@mlflow.example:5000"},
        }
    )
    assert len(list_params(config)) > 100, "more than MLflow takes in one call"
    note_config(open_parent(run_dir), config)
    assert carry(run_dir, uri) == [] and count_backlog(run_dir).refused == 0
    params = get_run(client, run_dir).data.params
    assert set(list_params(config)) <= params.keys()
    assert params["train.max_steps"] == "321" and float(params["train.optimizer.learning_rate"]) == 3e-5
    assert params["model.name"] == "m" and params["tracking.uri"] == "http://***@mlflow.example:5000"
    assert (
        params["corpus.sources"].startswith('[{"path": "/data/part_000.jsonl"') and params["corpus.sources"][-1] == "…"
    )
    assert max(map(len, params.values())) == 500, "servers before 2.10 take no more"
    assert SECRET not in (run_dir / "tracking" / "lineage.jsonl").read_text()


def test_the_corpus_is_the_runs_input_once(run_dir: Path, uri: str, client: Any) -> None:
    digest = "0123456789abcdef" * 4
    dataset = Dataset(
        "a.txt + b.txt", digest, f"s3://anna:{SECRET}@bucket/store", {"num_rows": 7, "documents": {"in": 9}}
    )
    open_parent(run_dir).log_dataset(dataset)
    carry(run_dir, uri)
    open_parent(run_dir).log_dataset(dataset)
    (run_dir / "tracking" / "sent.json").unlink()
    assert carry(run_dir, uri) == [] and count_backlog(run_dir).refused == 0
    (given,) = get_run(client, run_dir).inputs.dataset_inputs
    assert {tag.key: tag.value for tag in given.tags} == {"mlflow.data.context": "training"}
    assert (given.dataset.name, given.dataset.digest) == ("a.txt + b.txt", digest[:36])
    assert given.dataset.source_type == "s3" and json.loads(given.dataset.source) == {"uri": "s3://***@bucket/store"}
    assert json.loads(given.dataset.profile) == {"num_rows": 7, "documents": {"in": 9}}


def test_a_description_points_to_pictures_of_its_own_run(run_dir: Path, uri: str, client: Any) -> None:
    parent, stage = open_stage(run_dir, "train")
    for tracker in (parent, stage):
        tracker.set_tags({NOTE_TAG: f"![loss](get-artifact?run_uuid={RUN_ID}&path=loss.png)", "other": RUN_ID})
    assert carry(run_dir, uri) == []
    for name in (PARENT, "train"):
        run = get_run(client, run_dir, name)
        assert run.data.tags[NOTE_TAG] == f"![loss](get-artifact?run_uuid={run.info.run_id}&path=loss.png)"
        assert run.data.tags["other"] == RUN_ID


def make_trials(names: Sequence[str]) -> dict[str, Trial]:
    shape = ModelShape.from_hf_config(QWEN3_0P6B)
    plan = make_plan(FreezeDeepPlanConfig(boundary=1), model=QWEN3_0P6B_IDENTITY, shape=shape)
    return {name: Trial(Point(1, "deep", PlanOptions(), 1e-3, 0, name), plan, 4, 1e12) for name in names}


LAST = {"step": 4, "loss": 2.5, "validation_loss": 2.5, "train_loss": 2.25, "tokens_per_s": 100.0, "notes": 1.5}


@pytest.mark.parametrize(
    ("end", "status"),
    [(TrainingError("one failed"), "FAILED"), (SystemExit(143), "KILLED"), (KeyboardInterrupt(), "KILLED")],
)
def test_a_sweeps_trials_end_as_they_ended(
    run_dir: Path, uri: str, client: Any, end: BaseException, status: str
) -> None:
    """A trial that begins again, in another job, goes on in the same run; one that failed has no record."""
    _, sweep = open_stage(run_dir, "sweep")
    trials = make_trials(["done", "lost", "left", "broken"])
    points = {name: trial.point for name, trial in trials.items()}
    runs = TrialRuns(sweep, run_dir / "sweep", trials, ["notes"])
    with pytest.raises(type(end)), closing_runs(runs):
        runs.begin(points["done"])
        runs.begin(points["broken"])
        runs.end(points["broken"], {"step": 2, "error": "the loss is not finite"})
        runs.begin(points["lost"])
        runs.end(points["lost"], None)
        runs.begin(points["left"])
        runs.end(points["done"], LAST)
        raise end
    assert [record.name for record in runs.failed] == ["broken", "lost"]
    assert [record.name for record in load_records(run_dir / "sweep")] == []  # folders of trials begin with `boundary_`
    record = load_record(run_dir / "sweep" / "done")
    assert record is not None and record.loss == 2.5 and record.text_losses == {"notes": 1.5}
    assert load_record(run_dir / "sweep" / "broken") is None
    again = TrialRuns(sweep, run_dir / "sweep", trials, ["notes"])
    again.begin(points["lost"])
    again.end(points["lost"], LAST)
    assert carry(run_dir, uri) == []
    found = {name: get_run(client, run_dir, f"sweep_{name}") for name in trials}
    assert {name: run.info.status for name, run in found.items()} == {
        "done": "FINISHED",
        "lost": "FINISHED",
        "left": status,
        "broken": "FAILED",
    }
    assert found["broken"].data.tags["layerplan.trial"] == "failed: the loss is not finite"
    done = found["done"].data
    assert done.metrics["result/validation_loss/trained"] == 2.5 and done.metrics["boundary"] == 1
    assert done.metrics["result/notes/loss"] == 1.5 and done.params["learning_rate"] == "0.001"
    assert done.metrics["cost/share_of_full/predicted"] == pytest.approx(trials["done"].plan.predicted_cost.flops_share)


def test_a_run_is_found_in_a_browser(run_dir: Path, uri: str, client: Any) -> None:
    assert describe_address(uri, run_dir) is None, "the store has not taken it"
    open_parent(run_dir)
    carry(run_dir, uri)
    info = get_run(client, run_dir).info
    page = f"#/experiments/{info.experiment_id}/runs/{info.run_id}?workflowType=machine_learning"
    assert describe_address(uri, run_dir) == (
        f"http://127.0.0.1:5000/{page} when served by: mlflow ui --backend-store-uri {uri}"
    )
    for given in ("https://mlflow.example/team/", f"https://anna:{SECRET}@mlflow.example/team?token={SECRET}"):
        assert describe_address(given, run_dir) == f"https://mlflow.example/team/{page}"
    assert describe_address("databricks", run_dir) is None


def test_the_newest_runs_of_a_database_are_listed_first(run_dir: Path, uri: str, client: Any) -> None:
    elsewhere, newer = run_dir.parent / "elsewhere", run_dir.parent / "newer"
    for folder, address in ((run_dir, None), (elsewhere, "http://mlflow.example"), (newer, None)):
        folder.mkdir(exist_ok=True)
        values = {"name": folder.name, "model": {"type": "pretrained", "name": "m"}, "tracking": {"uri": address}}
        (folder / "resolved_config.json").write_text(dump_config(validate_config(values)))
        open_parent(folder)
        carry(folder, uri)
    (run_dir.parent / "not_a_run").mkdir()
    found = list(list_addresses(run_dir.parent, 5011))
    assert [name for name, _ in found] == ["newer", "run"]
    view = "?workflowType=machine_learning"
    assert found[1][1] == f"http://127.0.0.1:5011/#/experiments/1/runs/{get_run(client, run_dir).info.run_id}{view}"
    assert find_table(found[1][1]) == f"http://127.0.0.1:5011/#/experiments/1/runs{view}"
