"""Checkpoints scored beside a real training: the guardrail stops it, and what was not scored is back-filled."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.artifacts import load_answers, load_results
from eval.csv_table import COLUMNS
from eval.encoding import encode_prompts, find_answer_tokens
from eval.engine import EngineSpec
from eval.items import load_benchmark
from eval.open_engine import open_engine
from eval.prompts import TEMPLATES, format_prompts
from eval.scoring import pick_letter
from layerplan.config.evaluation import BenchmarkConfig
from layerplan.models.causal_lm import load_tokenizer
from layerplan.models.ref import ModelRef

RunJob = Callable[..., Any]
MAX_STEPS = 4000


@pytest.fixture(scope="module")
def own_answers(seed_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark whose keys are what the untouched model answers: the base is right everywhere, training can only lose."""
    builtin = BenchmarkConfig(name="ceval")
    benchmark, template = load_benchmark(builtin), TEMPLATES["official", "ceval"]
    tokenizer = load_tokenizer(seed_model)
    tokens = find_answer_tokens(tokenizer, seed_model, cue="\n" + template.cue, prefix="")
    ids = encode_prompts(tokenizer, format_prompts(benchmark, style="official"), add_special_tokens=True)
    spec = EngineSpec(ModelRef(seed_model), "transformers", "float32", 0, tokens.letters, 1024)
    answers = open_engine(spec).ask(ids, [1] * len(ids))
    root = tmp_path_factory.mktemp("own_answers")
    subjects = {item.subject: {"name_zh": item.subject_zh, "category": item.category} for item in benchmark.questions}
    (root / "subjects.json").write_text(json.dumps(subjects), encoding="utf-8")
    (root / "val").mkdir()
    for subject in subjects:
        with (root / "val" / f"{subject}.csv").open("w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(COLUMNS)
            for item, answer in zip(benchmark.questions, answers, strict=True):
                if item.subject == subject:
                    number = item.id.partition("/")[2]
                    writer.writerow([number, item.question, *item.choices, pick_letter(answer.letter_logprobs)])
    return root


@pytest.fixture(scope="module")
def notes(own_answers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve short documents."""
    path = tmp_path_factory.mktemp("notes") / "notes.jsonl"
    questions = load_benchmark(BenchmarkConfig(name="ceval")).questions[:12]
    lines = [json.dumps({"id": item.id, "text": item.question + item.choices[0]}) for item in questions]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config(
    seed_model: str, own_answers: Path, notes: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A training so fast that it destroys the base, scored every 200 steps, on one worker."""
    values = yaml.safe_load(tiny_config.read_text(encoding="utf-8"))
    values |= {"model": {"type": "pretrained", "name": seed_model}, "plan": {"type": "full"}, "name": "guarded"}
    values["train"] |= {"max_steps": MAX_STEPS, "num_workers": 1, "checkpoint_every_steps": 200, "keep_checkpoints": 2}
    values["train"] |= {"validate_every_steps": MAX_STEPS, "log_every_steps": 200, "write_ledger": False}
    values["train"]["optimizer"] = {"learning_rate": 2.0e-2}
    values["evaluation"] = {
        "benchmarks": [{"name": "ceval", "path": str(own_answers), "max_questions": 64}],
        "protocols": ["logit"],
        "backend": "transformers",
        "continuation_prompts": ["计算机"],
        "continuation_tokens": 4,
        "held_out": [{"name": "notes", "source": {"path": str(notes)}}],
        "score_every_steps": 200,
        "guardrail_points": 10,
    }
    values["tracking"] = {"backend": "none"}
    values["storage_path"] = str(tmp_path_factory.mktemp("runs"))
    path = tmp_path_factory.mktemp("config") / "guarded.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.long
def test_a_guardrail_stops_training_and_old_checkpoints_are_back_filled(config: Path, run_here: RunJob) -> None:
    run = Path(yaml.safe_load(config.read_text())["storage_path"]) / "guarded"
    job = run_here("jobs/cpt.py", "--config", config)
    assert job.returncode == 1, job.output[-6000:]
    assert "error: evaluation.guardrail_points=10: training was stopped by the score of step 200: " in job.output
    assert not (run / "training.json").exists()
    assert load_results(run / "evaluation" / "base")["ceval/logit"].question_mean == 100.0
    fallen = load_results(run / "evaluation" / "step_00000200")["ceval/logit"]
    verdict = json.loads((run / "guardrail.json").read_text(encoding="utf-8"))["verdict"]
    assert verdict["difference"] == pytest.approx(fallen.question_mean - 100)
    saved = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))
    assert saved[-1] < MAX_STEPS, "training went on to its end"
    assert saved[-1] >= 200

    last = f"step_{saved[-1]:08d}"
    filled = run_here("jobs/evaluate.py", "--config", config, "--checkpoints", saved[-1])
    assert filled.returncode == 0, filled.output[-4000:]
    assert f"Step {saved[-1]}: accuracy" in filled.output
    assert len(load_answers(run / "evaluation" / last, "ceval", "logit")) == 64
    for label in ("base", "step_00000200", last):
        held_out = json.loads((run / "evaluation" / label / "held_out" / "notes.json").read_text())
        assert len(held_out["document_nats"]) == 12
        assert (run / "evaluation" / label / "continuations.jsonl").is_file()
    assert not list((run / "hf").glob("*")), "an export made only to be scored stays behind"
