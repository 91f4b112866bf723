"""The other jobs, on a model folder nobody of ours saved."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RunJob = Callable[..., Any]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model_folder(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model, opened and written again by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("model") / "some_model"
    base = next((finished_run / "base_model" / "hf").iterdir())
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(model_folder: Path, write_pretrained_config: Callable[..., Path]) -> Path:
    """The tiny config on an existing model, whose path begins where jobs do."""
    return write_pretrained_config(os.path.relpath(model_folder, ROOT))


def settings(**values: object) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


@pytest.mark.long
def test_a_sweep_trains_three_boundaries_as_nested_runs(
    finished_run: Path, tiny_config: Path, tmp_path: Path, run_here: RunJob
) -> None:
    """Three boundaries need four layers: the base is a random model of its own."""
    import mlflow
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "four_layers"
    base = next((finished_run / "base_model" / "hf").iterdir())
    shape = AutoConfig.from_pretrained(base, num_hidden_layers=4, layer_types=["full_attention"] * 4)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    values = yaml.safe_load(tiny_config.read_text(encoding="utf-8"))
    values |= {"model": {"type": "pretrained", "name": str(folder)}}
    values |= {"sweep": {"boundaries": [1, 3], "max_steps": 4}}
    values["train"]["num_workers"] = 1
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    command = ("jobs/sweep_boundary.py", "--config", tmp_path / "sweep.yaml")
    job = run_here(*command, *settings(storage_path=tmp_path, name="sweep"))
    assert job.returncode == 0, job.output[-5000:]
    first = {item["boundary"]: item for item in read(tmp_path / "sweep" / "sweep" / "results.json")}
    assert sorted(first) == [1, 3]
    values["sweep"]["boundaries"] = [1, 2, 3]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    job = run_here(*command, *settings(storage_path=tmp_path, name="sweep"))
    assert job.returncode == 0, job.output[-5000:]
    results = read(tmp_path / "sweep" / "sweep" / "results.json")
    assert sorted(item["boundary"] for item in results) == [1, 2, 3]
    assert [item["step"] for item in results] == [4, 4, 4]
    assert {item["boundary"]: item for item in results if item["boundary"] != 2} == first, "a trial was trained again"
    losses = [item["validation_loss"] for item in results]
    assert losses == sorted(losses)
    shares = {item["boundary"]: item["flops_share"] for item in results}
    assert shares[1] < shares[2] < shares[3] < 1
    table = [line for line in job.output.splitlines() if f"{losses[0]:.4f}" in line and "│" in line]
    assert len(table) == sum(f"{loss:.4f}" == f"{losses[0]:.4f}" for loss in losses), "a base of random weights may tie"
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("layerplan")
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    stage = {run.data.tags.get("layerplan.stage"): run for run in runs.values()}
    for boundary in (1, 2, 3):
        trial = stage[f"sweep_boundary_{boundary:02d}"]
        assert trial.data.tags["mlflow.parentRunId"] == stage["sweep"].info.run_id
        assert trial.data.params["boundary"] == str(boundary) and trial.info.status == "FINISHED"
        assert trial.data.metrics["result/validation_loss/trained"] in losses
        assert [point.step for point in client.get_metric_history(trial.info.run_id, "train/loss")] == [1, 4]


def test_tracing_alone_leaves_profile_and_plan(
    config: Path, tmp_path: Path, run_here: RunJob, finished_run: Path
) -> None:
    arguments = settings(storage_path=tmp_path, name="traced", plan="{type: from_profile}")
    job = run_here("jobs/trace_layers.py", "--config", config, *arguments)
    assert job.returncode == 0, job.output[-5000:]
    profile, plan = (read(tmp_path / "traced" / f"{name}.json") for name in ("layer_profile", "freeze_plan"))
    assert plan["evidence"]["profile_sha256"] == profile["sha256"]
    assert not (tmp_path / "traced" / "token_store").exists()
    page = (tmp_path / "traced" / "report.html").read_text(encoding="utf-8")
    words = (tmp_path / "traced" / "freeze_plan.md").read_text(encoding="utf-8")
    for said in ("supports no boundary", "the model has too few layers for one", "95 % interval"):
        assert said in page and said in words and said in job.output, said
    drawn = {path.stem for path in (tmp_path / "traced" / "figures").glob("*.png")}
    assert {"task_particle", "layer_sensitivity", "profiles", "deviations", "layer_map"} <= drawn
    assert page.count("<svg") >= len(drawn) - 1, "the page draws the plan's map in HTML and holds the rest as SVG"
    before = read(finished_run / "layer_profile.json")
    assert profile["task_particle"] == pytest.approx(before["task_particle"], rel=1e-5)
    assert profile["layer_sensitivity"] == pytest.approx(before["layer_sensitivity"], rel=1e-4)


def test_a_store_built_alone_is_the_store_of_the_chain(
    config: Path, tmp_path: Path, run_here: RunJob, finished_run: Path
) -> None:
    arguments = settings(storage_path=tmp_path, name="built", **{"tracking.backend": "none"})
    job = run_here("jobs/build_corpus.py", "--config", config, *arguments)
    assert job.returncode == 0, job.output[-5000:]
    assert f"store     {tmp_path / 'built' / 'token_store'}\n" in job.output, "on one line, however narrow the table is"
    built, chain = (read(run / "token_store" / "manifest.json") for run in (tmp_path / "built", finished_run))
    assert built["counts"] == chain["counts"]
    assert [shard["sha256"] for shard in built["shards"]] == [shard["sha256"] for shard in chain["shards"]]
    assert f"{built['num_tokens']:,}" in job.output


def test_any_model_folder_can_be_scored(
    config: Path, tmp_path: Path, run_here: RunJob, model_folder: Path, finished_run: Path
) -> None:
    """The same weights written by transformers get the same answers; those of the chain came from vLLM."""
    job = run_here(
        "jobs/evaluate.py",
        *("--config", config, "--model", model_folder, "--out", tmp_path / "scores"),
        *settings(name="scores", **{"evaluation.protocols": "[logit, generate]"}),
    )
    assert job.returncode == 0, job.output[-5000:]
    scored, chain = (read(folder / "ceval.json") for folder in (tmp_path / "scores", finished_run / "evaluation/base"))
    for key in ("ceval/logit", "ceval/generate"):
        assert scored[key]["num_asked"] == 16
        assert scored[key]["num_correct"] == chain[key]["num_correct"]
        assert key in job.output


def test_runs_are_compared_with_their_base(finished_run: Path, tmp_path: Path, run_here: RunJob) -> None:
    shutil.copytree(finished_run / "evaluation", tmp_path / "twin" / "evaluation")
    shutil.copy(finished_run / "training.json", tmp_path / "twin")
    job = run_here("jobs/compare.py", finished_run, tmp_path / "twin", "--out", tmp_path / "verdicts.json")
    assert job.returncode == 0, job.output[-3000:]
    verdicts = read(tmp_path / "verdicts.json")
    # under each of two protocols: both runs against the base, and against each other
    assert [verdict["reference"] for verdict in verdicts] == 2 * ["the base", "the base", "quiet"]
    assert verdicts[0]["difference"] == verdicts[1]["difference"]
    assert verdicts[2]["difference"] == 0
    refused = run_here("jobs/compare.py", tmp_path / "nothing")
    assert refused.returncode == 1
    assert "error: " in refused.output and "nothing" in refused.output
