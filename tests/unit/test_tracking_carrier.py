"""From the outbox into a real MLflow store on SQLite: everything, once, whatever happens to either."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from layerplan.errors import TrackingError
from layerplan.tracking.outbox import TrackingFolder
from layerplan.tracking.position import count_backlog
from tests.mlflow_server import carry, make_sink, open_stage, points_of


def ids(run_dir: Path) -> dict[str, str]:
    return json.loads((run_dir / "mlflow_runs.json").read_text())


def log_attempt(run_dir: Path, start_step: int, stop_step: int, *, shift: float = 0.0) -> None:
    parent, stage = open_stage(run_dir, "train")
    sink = make_sink(run_dir, stage, start_step)
    for step in range(start_step + 1, stop_step + 1):
        sink.log_metrics({"train/loss": 10.0 - step + shift, "constant": 1.0}, step)
    parent.log_params({"plan": "full", "other": start_step})
    stage.close()
    parent.close()


def test_a_run_lies_in_the_run_it_was_opened_from(run_dir: Path, uri: str, client: Any):
    _, sweep = open_stage(run_dir, "sweep")
    trial = sweep.child("sweep_boundary_01")
    trial.log_params({"boundary": 1})
    trial.close()
    assert carry(run_dir, uri) == []
    made = ids(run_dir)
    assert client.get_run(made["sweep"]).data.tags["mlflow.parentRunId"] == made["parent"]
    assert client.get_run(made["sweep_boundary_01"]).data.tags["mlflow.parentRunId"] == made["sweep"]


def test_a_resubmitted_run_continues_in_the_same_runs_and_no_step_is_there_twice(run_dir: Path, uri: str, client: Any):
    log_attempt(run_dir, 0, 3)
    assert carry(run_dir, uri) == []
    before = ids(run_dir)
    log_attempt(run_dir, 2, 5)
    assert carry(run_dir, uri) == [] and count_backlog(run_dir).is_empty
    assert ids(run_dir) == before
    assert points_of(client, before["train"], "train/loss") == [(step, 10.0 - step) for step in range(1, 6)]
    nested, parent = client.get_run(before["train"]), client.get_run(before["parent"])
    assert nested.data.tags["mlflow.parentRunId"] == before["parent"] and nested.info.status == "FINISHED"
    assert nested.data.tags["rolled_back.3_to_3"].startswith("steps 3 to 3 did not last; training went on from step 2;")
    assert parent.data.params == {"plan": "full", "other": "0"}
    written = [
        line for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if "event" not in line
    ]
    logged = {point.step: point.timestamp for point in client.get_metric_history(before["train"], "train/loss")}
    assert {line["step"]: line["time"] for line in written if line["step"] != 3}.items() <= logged.items()


def test_a_step_that_came_out_otherwise_follows_at_the_same_step_with_a_later_time(
    run_dir: Path, uri: str, client: Any
):
    log_attempt(run_dir, 0, 4)
    carry(run_dir, uri)
    log_attempt(run_dir, 2, 5, shift=0.5)
    carry(run_dir, uri)
    run_id = ids(run_dir)["train"]
    assert points_of(client, run_id, "train/loss") == [(1, 9), (2, 8), (3, 7), (4, 6), (3, 7.5), (4, 6.5), (5, 5.5)]
    assert [step for step, _ in points_of(client, run_id, "constant")] == [1, 2, 3, 4, 5]
    assert "rolled_back.3_to_4" in client.get_run(run_id).data.tags


@pytest.mark.parametrize("remembered", ["nothing", "less", "garbage"])
def test_points_are_not_doubled_when_what_was_acknowledged_is_not_known(
    run_dir: Path, uri: str, client: Any, remembered: str
):
    """As after a kill between an answer and its note, or an answer that never came."""
    sent = TrackingFolder(run_dir).sent
    parent, stage = open_stage(run_dir, "train")
    sink = make_sink(run_dir, stage)
    sink.log_metrics({"train/loss": 3.0, "nan": math.nan, "inf": math.inf}, 1)
    carry(run_dir, uri)
    earlier = sent.read_text()
    sink.log_metrics({"train/loss": 2.0, "nan": math.nan, "inf": -math.inf}, 2)
    parent.log_metrics({"score": 0.5}, 0)
    carry(run_dir, uri)
    if remembered == "nothing":
        sent.unlink()
    else:
        sent.write_text(earlier if remembered == "less" else earlier[:20])
    sink.log_metrics({"train/loss": 1.0}, 3)
    parent.log_metrics({"score": 0.5}, 0)
    assert carry(run_dir, uri) == [] and count_backlog(run_dir).is_empty
    run_id = ids(run_dir)["train"]
    assert points_of(client, run_id, "train/loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert (
        [step for step, _ in points_of(client, run_id, "nan")]
        == [1, 2]
        == [step for step, _ in points_of(client, run_id, "inf")]
    )
    assert points_of(client, ids(run_dir)["parent"], "score") == [(0, 0.5)]


def test_a_run_whose_id_was_not_noted_is_found_again(run_dir: Path, uri: str, client: Any):
    log_attempt(run_dir, 0, 2)
    carry(run_dir, uri)
    before = ids(run_dir)
    (run_dir / "mlflow_runs.json").unlink()
    log_attempt(run_dir, 2, 3)
    assert carry(run_dir, uri) == []
    assert ids(run_dir) == before
    assert len(client.search_runs([client.get_experiment_by_name("layerplan").experiment_id])) == 2
    assert len(points_of(client, before["train"], "train/loss")) == 3


def test_another_store_gets_everything(run_dir: Path, uri: str, empty_database: Path):
    import mlflow

    log_attempt(run_dir, 0, 2)
    carry(run_dir, uri)
    other = f"sqlite:///{shutil.copy(empty_database, run_dir.parent / 'other.db')}"
    log_attempt(run_dir, 2, 3)
    assert carry(run_dir, other) == []
    client = mlflow.MlflowClient(tracking_uri=other)
    assert [step for step, _ in points_of(client, ids(run_dir)["train"], "train/loss")] == [1, 2, 3]
    assert client.get_run(ids(run_dir)["parent"]).data.params["plan"] == "full"


def test_a_run_folder_of_an_earlier_version_continues(run_dir: Path, uri: str, client: Any):
    """Its lines have no time, its points are in the store, and its runs are known by the book alone."""
    number = client.create_experiment("layerplan", artifact_location=(run_dir.parent / "mlartifacts").as_uri())
    book = {stage: client.create_run(number).info.run_id for stage in ("parent", "train")}
    (run_dir / "mlflow_runs.json").write_text(json.dumps(book))
    lines = [{"run": "train", "step": step, "train/loss": float(step)} for step in (1, 2, 3)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (1, 2):
        client.log_metric(book["train"], "train/loss", float(step), step=step)
    _, stage = open_stage(run_dir, "train")
    make_sink(run_dir, stage, 3).log_metrics({"train/loss": 4.0}, 4)
    assert carry(run_dir, uri) == []
    assert ids(run_dir) == book
    assert sorted(points_of(client, book["train"], "train/loss")) == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_deleted_experiment_holds_things_up_until_it_is_restored(run_dir: Path, uri: str, client: Any):
    log_attempt(run_dir, 0, 2)
    carry(run_dir, uri)
    number = client.get_experiment_by_name("layerplan").experiment_id
    client.delete_experiment(number)
    log_attempt(run_dir, 2, 4)
    with pytest.raises(TrackingError) as caught:
        carry(run_dir, uri)
    words = str(caught.value)
    assert words.startswith("tracking.experiment=layerplan: was deleted in sqlite:///") and "\n" not in words
    assert f"mlflow experiments restore --experiment-id {number}`, or set tracking.experiment to another name" in words
    assert not count_backlog(run_dir).refused
    client.restore_experiment(number)
    assert carry(run_dir, uri) == [] and count_backlog(run_dir).is_empty
    assert len(points_of(client, ids(run_dir)["train"], "train/loss")) == 4


def test_an_experiment_deleted_while_it_is_open_is_named_too(run_dir: Path, uri: str, client: Any):
    from layerplan.tracking.carrier import Carrier
    from layerplan.tracking.mlflow_store import MlflowStore

    _, stage = open_stage(run_dir, "train")
    sink = make_sink(run_dir, stage)
    folder = TrackingFolder(run_dir)
    store = MlflowStore(uri, "layerplan", folder)
    store.open()
    carrier = Carrier(folder, store)
    carrier.carry()
    number = client.get_experiment_by_name("layerplan").experiment_id
    client.delete_experiment(number)
    sink.log_metrics({"train/loss": 1.0}, 1)
    failures = carrier.carry().failures
    assert [str(error).partition(" in ")[0] for error in failures] == ["tracking.experiment=layerplan: was deleted"]
    client.restore_experiment(number)
    assert carrier.carry().failures == []
    assert points_of(client, ids(run_dir)["train"], "train/loss") == [(1, 1.0)]


def test_a_locked_database_is_waited_for(run_dir: Path, uri: str, client: Any):
    log_attempt(run_dir, 0, 1)
    carry(run_dir, uri)
    log_attempt(run_dir, 1, 2)
    with closing(sqlite3.connect(run_dir.parent / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        failures = carry(run_dir, uri)
    assert failures and "database is locked" in str(failures[0])
    assert carry(run_dir, uri) == []
    assert len(points_of(client, ids(run_dir)["train"], "train/loss")) == 2


def test_what_the_store_will_never_take_is_set_aside_and_counted(run_dir: Path, uri: str, client: Any):
    _, stage = open_stage(run_dir, "train")
    sink = make_sink(run_dir, stage)
    sink.log_metrics({"train/loss": 2.0, "odd?name": 1.0}, 1)
    sink.log_metrics({"train/loss": 1.0}, 2)
    stage.log_params({"good": 1, "odd?param": 2})
    stage.log_artifact(run_dir / "removed.json")
    (run_dir / "plan.json").write_text("{}")
    stage.log_artifact(run_dir / "plan.json")
    assert carry(run_dir, uri) == []
    backlog = count_backlog(run_dir)
    assert backlog.is_empty and backlog.refused == 3
    refused = [json.loads(line) for line in TrackingFolder(run_dir).refused.read_text().splitlines()]
    assert {line["what"] for line in refused} == {
        "metric odd?name of step 1",
        "parameter odd?param",
        "artifact removed.json",
    }
    assert all(line["reason"] for line in refused)
    run_id = ids(run_dir)["train"]
    assert points_of(client, run_id, "train/loss") == [(1, 2.0), (2, 1.0)]
    assert client.get_run(run_id).data.params == {"good": "1"}
    assert [path.name for path in (run_dir.parent / "mlartifacts").rglob("*.json")] == ["plan.json"]


def test_a_store_of_files_that_takes_no_such_name_gets_the_rest(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """It refuses to be asked for a metric of that name too, which a database answers with no point."""
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    address = (run_dir.parent / "mlruns").as_uri()
    parent, _ = open_stage(run_dir, "train")
    parent.log_metrics({"result/loss": 2.0, "odd*name": 1.0}, 1)
    parent.set_tags({"later": "yes"})
    assert carry(run_dir, address) == [] and count_backlog(run_dir).is_empty
    run = mlflow.MlflowClient(tracking_uri=address).get_run(ids(run_dir)["parent"])
    assert run.data.metrics == {"result/loss": 2.0} and run.data.tags["later"] == "yes"
    assert count_backlog(run_dir).refused == 1


def test_what_counts_as_sent_has_arrived_where_the_client_is_told_to_log_behind_our_back(
    run_dir: Path, uri: str, client: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    parent, stage = open_stage(run_dir, "train")
    sink = make_sink(run_dir, stage)
    for step in range(400):
        sink.log_metrics({"train/loss": 1.0, "constant": 1.0}, step)
    parent.log_params({"plan": "full"})
    parent.set_tags({"kind": "test"})
    assert carry(run_dir, uri) == [] and count_backlog(run_dir).is_empty
    made = ids(run_dir)
    assert len(points_of(client, made["train"], "train/loss")) == 400
    data = client.get_run(made["parent"]).data
    assert data.params == {"plan": "full"} and data.tags["kind"] == "test"


def test_a_tag_is_cut_to_what_every_server_takes(run_dir: Path, uri: str, client: Any):
    parent, _ = open_stage(run_dir, "train")
    parent.set_tags({"long": "x" * 9000})
    parent.log_params({"long": "x" * 9000})
    assert carry(run_dir, uri) == []
    data = client.get_run(ids(run_dir)["parent"]).data
    assert (len(data.tags["long"]), len(data.params["long"])) == (5000, 6000)
