"""The whole chain from one command: every artifact real, one lineage, and nothing done twice."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from layerplan.report.answer_tables import show_text


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_each_stage_leaves_its_artifact(finished_run: Path) -> None:
    for name in (
        "resolved_config.json",
        "layer_profile.json",
        "layer_probes.parquet",
        "self_test.json",
        "freeze_plan.json",
        "freeze_plan.md",
        "predicted_cost.json",
        "token_store/manifest.json",
        "metrics.jsonl",
        "training.json",
        "export.json",
        "checkpoints/step_00000040/train_state.json",
        "checkpoints/step_00000040/seal.json",
        "hf/step_00000040/model.safetensors",
        "hf/step_00000040/tokenizer.json",
        "evaluation/base/ceval.json",
        "evaluation/step_00000040/ceval.json",
        "evaluation/step_00000040/ceval.jsonl",
        "evaluation/step_00000040/continuations.jsonl",
        "evaluation/scores.md",
        "evaluation/scores.tex",
        "verdicts.json",
        "report.html",
        "figures/profiles.png",
    ):
        assert (finished_run / name).is_file(), name
    assert not list(finished_run.rglob("*.partial"))


def test_corpus_counts_add_up(finished_run: Path) -> None:
    manifest = read(finished_run / "token_store" / "manifest.json")
    counts = dict(manifest["counts"])
    assert counts.pop("in") == sum(counts.values())
    assert manifest["num_tokens"] + manifest["num_padding_tokens"] == manifest["num_rows"] * manifest["seq_len"]
    stored = sum(
        pq.read_metadata(finished_run / "token_store" / shard["name"]).num_rows for shard in manifest["shards"]
    )
    assert stored == manifest["num_rows"]


def test_the_model_was_asked_before_training_and_once_more_when_it_was_placed(finished_run: Path) -> None:
    asked, proof = read(finished_run / "self_test.json"), read(finished_run / "training.json")["proof"]
    assert asked["recipe"]["rows"] == "packed" and not asked["refused"]
    assert asked["loss"] == pytest.approx(asked["loss_alone"], rel=1e-4) and asked["gradient_error"] < 1e-4
    assert proof["loss_recipe"] == "packed rows, any attention, linear head"
    assert proof["self_tests"] >= 1 and proof["self_test_difference"] < 2e-2


def test_the_plan_carries_the_profile_it_was_made_from(finished_run: Path) -> None:
    plan, profile = read(finished_run / "freeze_plan.json"), read(finished_run / "layer_profile.json")
    assert plan["evidence"]["profile_sha256"] == profile["sha256"]
    assert plan["trainable_layers"] == list(range(plan["evidence"]["boundary"]["boundary"]))
    assert profile["num_probes"] == 20


def test_exactly_the_planned_tensors_moved(finished_run: Path) -> None:
    """Read back with safetensors alone, not with the code that wrote them."""
    plan = read(finished_run / "freeze_plan.json")
    base = load_file(next((finished_run / "base_model" / "hf").iterdir()) / "model.safetensors")
    trained = load_file(finished_run / "hf" / "step_00000040" / "model.safetensors")
    assert base.keys() == trained.keys()
    for name, tensor in base.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        moves = layer is not None and int(layer.group(1)) in plan["trainable_layers"]
        assert torch.equal(tensor, trained[name]) != moves, name
    assert read(finished_run / "export.json")["frozen_tensors_identical_to_base"] == sum(
        torch.equal(tensor, trained[name]) for name, tensor in base.items()
    )


def test_transformers_opens_the_export(finished_run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished_run / "hf" / "step_00000040"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("import", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 4


def test_both_protocols_answered_every_question(finished_run: Path) -> None:
    for label in ("base", "step_00000040"):
        results = read(finished_run / "evaluation" / label / "ceval.json")
        assert list(results) == ["ceval/logit", "ceval/generate"]
        lines = (finished_run / "evaluation" / label / "ceval.jsonl").read_text(encoding="utf-8").splitlines()
        asked = [json.loads(line)["protocol"] for line in lines]
        for protocol in ("logit", "generate"):
            result = results[f"ceval/{protocol}"]
            assert result["num_asked"] == asked.count(protocol) == 16
            assert result["num_correct"] + result["num_wrong"] + result["num_unparsed"] == 16
    verdicts = read(finished_run / "verdicts.json")
    assert [(item["protocol"], item["num_questions"]) for item in verdicts] == [("logit", 16), ("generate", 16)]


def test_the_summary_shows_both_scores_with_intervals_and_counts(finished_run: Path) -> None:
    output = (finished_run / "output.txt").read_text(encoding="utf-8")
    for item in read(finished_run / "verdicts.json"):
        for value, interval in (
            (item["reference_accuracy"], item["reference_interval"]),
            (item["accuracy"], item["accuracy_interval"]),
        ):
            assert f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]" in output
    assert re.search(r"ceval/logit\s*│\s*16 ", output)
    assert str(finished_run / "report.html") in output
    # Ray's own watcher of a run may be asking the cluster something when the job shuts it down
    ours = [line for line in output.splitlines() if "(PlacementGroupCleaner" not in line]
    assert not [line for line in ours if "Traceback" in line]
    assert (
        output.count("[train] step 40/40  loss") == output.count("step 40/40  loss") == 1
        and "[corpus] 100.0%" in output
    )
    assert "constructor arguments" not in output, "Ray's advice to whoever writes an actor"


def test_the_lineage_is_one_parent_with_a_nested_run_per_stage(finished_run: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{finished_run.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("layerplan")
    runs = client.search_runs([experiment.experiment_id], "tags.mlflow.runName = 'quiet'")
    assert [run.info.status for run in runs] == ["FINISHED"]
    parent = runs[0].info.run_id
    nested = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent}'")
    stages = {run.data.tags["layerplan.stage"]: run for run in nested}
    expected = {
        "base_model",
        "self_test",
        "corpus",
        "trace",
        "plan",
        "train",
        "evaluate_base",
        "evaluate_step_00000040",
        "verdict",
    }
    assert set(stages) == expected
    losses = client.get_metric_history(stages["train"].info.run_id, "train/loss")
    assert [point.step for point in losses] == [1, *range(5, 41, 5)]
    written = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line["train/loss"] for line in written if line["run"] == "train" and "train/loss" in line}
    assert {point.step: point.value for point in losses} == pytest.approx(by_step)
    assert stages["train"].data.metrics["perf/slowest_rank"] in (0, 1), "two workers"
    assert stages["train"].data.metrics["system/node_0/system_memory_usage_megabytes"] > 100
    assert stages["train"].data.params["max_steps"] == "40"
    validated = client.get_metric_history(stages["train"].info.run_id, "validation/loss")
    assert [point.step for point in validated] == [0, 20, 40]
    training = read(finished_run / "training.json")
    assert runs[0].data.metrics["result/validation_loss/base"] == validated[0].value == training["base_validation_loss"]
    assert runs[0].data.params["train.max_steps"] == "40" and runs[0].data.metrics["result/tokens_seen"] > 0
    assert runs[0].data.tags["layerplan.plan_sha256"] == read(finished_run / "freeze_plan.json")["sha256"]
    (corpus,) = runs[0].inputs.dataset_inputs
    assert runs[0].data.tags["layerplan.corpus_sha256"].startswith(corpus.dataset.digest)
    pictures = re.findall(r"run_uuid=(\w+)&path=figures%2F(\w+\.png)", runs[0].data.tags["mlflow.note.content"])
    kept = {Path(file.path).name for file in client.list_artifacts(parent, "figures")}
    assert pictures and {run for run, _ in pictures} == {parent} and {name for _, name in pictures} <= kept
    page = f"http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}/runs/{parent}"
    assert f"lineage   {page}" in (finished_run / "output.txt").read_text(encoding="utf-8")
    assert runs[0].data.metrics["cost/rows_seq_len"] == 64
    names = {item.path for item in client.list_artifacts(parent)}
    assert {"report.html", "resolved_config.json", "figures", "model_card"} <= names
    assert {item.path for item in client.list_artifacts(stages["plan"].info.run_id)} >= {"freeze_plan.json"}
    assert {item.path for item in client.list_artifacts(stages["trace"].info.run_id)} >= {"layer_profile.json"}


def test_the_report_needs_nothing_from_outside(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 6
    assert not re.search(r"""(?:src|href)\s*=\s*["']https?:""", page)
    assert "exported tensors identical to the base, byte for byte" in page
    assert "tensors that train and have a gradient" in page
    for label in ("base", "step_00000040"):
        lines = (finished_run / "evaluation" / label / "continuations.jsonl").read_text(encoding="utf-8").split("\n")
        assert html.escape(show_text(json.loads(lines[0])["text"])) in page
    assert "<th>prompt</th><th>base</th><th>trained, step 40</th>" in page


def test_the_loss_before_the_first_step_is_everywhere(finished_run: Path) -> None:
    training = read(finished_run / "training.json")
    before, after = (f"{training[name]:.4f}" for name in ("base_validation_loss", "validation_loss"))
    line = f"Validation loss: {before} before the first step, {after} after the last"
    for name in ("report.html", "hf/step_00000040/README.md"):
        assert line in (finished_run / name).read_text(encoding="utf-8"), name
    assert line in " ".join((finished_run / "output.txt").read_text(encoding="utf-8").split())
    assert "work in rows of 64 tokens" in (finished_run / "report.html").read_text(encoding="utf-8")


def test_the_scores_are_exported_in_the_papers_layout(finished_run: Path) -> None:
    rows = (finished_run / "evaluation" / "scores.md").read_text(encoding="utf-8").splitlines()
    assert rows[2].startswith("| Models | STEM | Social Science | Humanities | Other | Average |")
    assert [row.split(" | ")[0] for row in rows[4:]] == ["| base", "| quiet"]
    results = read(finished_run / "evaluation" / "base" / "ceval.json")
    both = " / ".join(f"{results[f'ceval/{protocol}']['category_mean']:.2f}" for protocol in ("generate", "logit"))
    assert both in rows[4]


def test_a_finished_run_is_not_repeated(finished_run: Path, tiny_config: Path, run_here: Callable[..., Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.safetensors")}
    metrics = (finished_run / "metrics.jsonl").read_bytes()
    job = run_here(
        *(
            "jobs/cpt.py",
            "--config",
            tiny_config,
            "--set",
            f"storage_path={finished_run.parent}",
            "--set",
            "name=quiet",
        ),
        *("--set", "evaluation.backend=vllm", "--set", "evaluation.protocols=[logit, generate]"),
    )
    assert job.returncode == 0, job.output[-3000:]
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.safetensors")} == before
    assert (finished_run / "metrics.jsonl").read_bytes() == metrics
    assert "[train] step" not in job.output
    assert "asking" not in job.output


def test_the_resolved_config_is_a_config(finished_run: Path, run_job: Callable[..., Any]) -> None:
    job = run_job("jobs/cpt.py", "--config", finished_run / "resolved_config.json", "--dry-run")
    assert job.returncode == 0, job.output
    shown = json.loads(job.output[: job.output.index("\n}\n") + 2])
    assert shown == read(finished_run / "resolved_config.json")
