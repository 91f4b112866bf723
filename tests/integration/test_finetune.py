"""Fine-tuning on prompts with a label as a job: measured, trained, stopped and continued, scored, on real Ray and gloo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from layerplan.artifacts import hash_file
from layerplan.corpus.manifest import Manifest
from layerplan.plan.row_starts import find_eof_layer
from layerplan.plan.sample_budget import assign_start_layers
from tests.ray_script import run_script

RunJob = Callable[..., Any]
ASK = """
import json, sys
from eval.engine import EngineSpec
from eval.open_engine import open_engine
from layerplan.models.ref import ModelRef
folder, prompts, letters = sys.argv[1], json.loads(sys.argv[2]), tuple(json.loads(sys.argv[3]))
engine = open_engine(EngineSpec(ModelRef(folder), "vllm", "float32", 0, letters, 64, num_threads=1))
answers = engine.ask(prompts, [8] * len(prompts))
print("ANSWERS" + json.dumps([[answer.token_ids, answer.letter_logprobs] for answer in answers]))
"""
ROWS, TEST_ROWS = 22, 8


@pytest.fixture(scope="module")
def config(seed_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of several lengths that end in a number, whose label is whether it is odd."""
    folder = tmp_path_factory.mktemp("task")
    for split, numbers in (("train", range(ROWS)), ("test", range(ROWS, ROWS + TEST_ROWS))):
        lines = [{"prompt": f"{'so ' * (n % 3)}{n}:", "label": "odd" if n % 2 else "even"} for n in numbers]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = {"type": "jsonl", "path": str(folder), "labels": {"odd": ["O"], "even": ["E"]}}
    values = {
        "name": "tuned",
        "storage_path": str(folder / "runs"),
        "seed": 3,
        "model": {"type": "pretrained", "name": seed_model},
        "finetune": {"task": task, "method": "salf"},
        "train": {
            "global_batch_size": 4,
            "micro_batch_size": "auto",
            "num_workers": 2,
            "num_cpus_per_worker": 0.25,
            "parallelism": "replicate",
            "compute_dtype": "float32",
            "checkpoint_every_steps": 3,
            "write_ledger": True,
            "optimizer": {"learning_rate": 1e-3},
        },
        "trace": {"num_cpus_per_actor": 0.25},
        "tracking": {"backend": "jsonl"},
    }
    path = folder / "tuned.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(config: Path) -> Path:
    return config.parent / "runs"


def test_a_job_measures_its_rows_trains_each_from_its_layer_and_is_scored(
    run_here: RunJob, config: Path, runs: Path
) -> None:
    job = run_here("jobs/finetune.py", "--config", config)
    assert job.returncode == 0, job.output[-5000:]
    run = runs / "tuned"
    records = pq.read_table(run / "label_samples" / "base_train.parquet").to_pylist()
    eof = [find_eof_layer(record["deviation_cosine"]) for record in records]
    manifest = Manifest.load(run / "token_store")
    assert manifest.labels is not None and manifest.counts == {"in": ROWS, "kept": ROWS, "filtered/too_long": 0}
    assert manifest.labels.start_layers == assign_start_layers(eof, [11, 11], seed=3)
    steps = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert sorted(row for step in steps for row in step["row_ids"]) == list(range(ROWS)) and len(steps) == 6
    starts = [{manifest.labels.start_layers[row] for row in step["row_ids"]} for step in steps]
    assert starts == [{0}, {0}, {0, 1}, {1}, {1}, {1}], "shallow start layers first"
    cost = read(run / "label_cost.json")
    assert cost["propagated_rows"] == [11, 11] and cost["planned"] == cost["counted"]
    assert cost["counted"]["depth"] == 0.25, "half of two layers: (L - 1) / 2L"
    scores = read(run / "label_scores.json")["models"]
    assert {name: each["num_asked"] for name, each in scores.items()} == {"base": 8, "step_00000006": 8}
    assert all(len(each["mean_deviation"]) == 3 for each in scores.values())
    assert (run / "deviations.png").read_bytes().startswith(b"\x89PNG")
    assert "<h2>Does it name the labels?</h2>" in (run / "report.html").read_text(encoding="utf-8")
    proof = read(run / "training.json")["proof"]
    assert proof["coverage_checks"] >= 2 and proof["frozen_checks"] >= 2
    assert "depth 25.0%" in job.output


def test_a_run_that_was_cut_off_ends_with_the_same_bytes(run_here: RunJob, config: Path, runs: Path) -> None:
    """What a run has left that was killed after step 3 of 6; the second half is trained again."""
    run, again = runs / "tuned", runs.parent / "again" / "tuned"
    shutil.copytree(run, again)
    for name in ("training.json", "export.json", "label_scores.json", "label_cost.json"):
        (again / name).unlink()
    shutil.rmtree(again / "hf")
    shutil.rmtree(again / "checkpoints" / "step_00000006")
    (again / "label_samples" / "step_00000006_test.parquet").unlink()
    job = run_here("jobs/finetune.py", "--config", config, "--set", f"storage_path={again.parent}")
    assert job.returncode == 0, job.output[-5000:]
    weights = [each / "hf" / "step_00000006" / "model.safetensors" for each in (run, again)]
    assert hash_file(weights[0]) == hash_file(weights[1])
    for name in ("label_scores.json", "label_cost.json"):
        assert read(run / name) == read(again / name)


def test_adapters_are_saved_in_pefts_own_format_and_merged_into_the_export(
    run_here: RunJob, config: Path, runs: Path, seed_model: str
) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    changes = ("name=adapted", "finetune.update=lora", "train.optimizer.learning_rate=0.03")
    job = run_here("jobs/finetune.py", "--config", config, *(word for each in changes for word in ("--set", each)))
    assert job.returncode == 0, job.output[-5000:]
    run = runs / "adapted"
    ids = torch.tensor([[5, 6, 7, 8]])
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(seed_model), run / "adapters" / "step_00000006"
    )
    merged = AutoModelForCausalLM.from_pretrained(run / "hf" / "step_00000006")
    with torch.no_grad():
        found, expected, base = (
            model(ids).logits for model in (merged, adapted, AutoModelForCausalLM.from_pretrained(seed_model))
        )
    assert (found - expected).abs().max() < 1e-5 < (expected - base).abs().max()
    assert read(run / "adapters" / "step_00000006" / "adapter_base.json")["num_layers"] == 2


def test_vllm_serves_the_merged_export_as_peft_serves_the_adapter(runs: Path, seed_model: str, tmp_path: Path) -> None:
    """Greedy tokens and log-probabilities of PEFT's own model, which the base's are far from; float32."""
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    run, letters = runs / "adapted", (36, 37, 38, 39)
    prompts = [[5, 6, 7, 8 + number] for number in range(6)]
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    done = run_script(
        str(script), run / "hf" / "step_00000006", json.dumps(prompts), json.dumps(letters), timeout_s=300
    )
    assert done.returncode == 0, done.stdout[-3000:]
    (served,) = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    base = AutoModelForCausalLM.from_pretrained(seed_model)
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(seed_model), run / "adapters" / "step_00000006"
    )
    moved = []
    for prompt, (tokens, logprobs) in zip(prompts, served, strict=True):
        ids = torch.tensor([prompt])
        greedy = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert greedy[0, len(prompt) :].tolist() == tokens
        with torch.no_grad():
            expected, before = (model(ids).logits[0, -1].log_softmax(0)[list(letters)] for model in (adapted, base))
        assert logprobs == pytest.approx(expected.tolist(), abs=1e-3)
        moved.append(float((expected - before).abs().max()))
    assert min(moved) > 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("finetune=null", "finetune: is required by this command"),
        ("plan={type: full}", "plan.type=full: finetune.method=salf decides the plan; leave plan out"),
        ("evaluation.score_every_steps=6", "evaluation.score_every_steps: base and result are scored on the task's"),
        (
            "evaluation.held_out=[{name: h, source: {path: x}}]",
            "evaluation.held_out: base and result are scored on the",
        ),
        ("train.max_steps=5", "train.max_steps=5: 1 epochs of 22 prompts at train.global_batch_size=4 are 6 steps"),
    ],
)
def test_what_task_and_method_decide_is_not_taken_from_elsewhere(
    run_here: RunJob, config: Path, change: str, words: str
) -> None:
    job = run_here("jobs/finetune.py", "--config", config, "--set", change, "--set", "name=refused")
    assert job.returncode == 2 and words in job.output
