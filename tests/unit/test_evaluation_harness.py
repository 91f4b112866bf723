"""Scores in `lm_eval` style against what lm-evaluation-harness 0.4.13 answered, question for question.

The harness's answers were recorded on a model built from a seed (nothing of it is installed here):

    python tests/unit/test_evaluation_harness.py FOLDER
    python benchmarks/evaluation.py --harness PYTHON --model FOLDER --max-questions 2 --record \
        tests/unit/data/lm_eval_predictions.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from eval.encoding import encode_prompts, find_answer_tokens
from eval.engine import EngineSpec, open_engine
from eval.items import load_benchmark
from eval.prompts import TEMPLATES, format_prompts
from eval.scoring import pick_letter
from layerplan.config.evaluation import BenchmarkConfig
from layerplan.config.model import ScratchModelConfig
from layerplan.models.causal_lm import load_tokenizer
from layerplan.models.files import hash_weight_files
from layerplan.models.scratch import build_scratch_model, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "unit" / "data" / "lm_eval_predictions.json"
POSITIONS = 4096


def build_model(folder: Path) -> None:
    """One layer over the questions written for this project; a vocabulary so small that " A" is two tokens."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "eval/data/builtin/val").glob("*.csv"))]
    config = ScratchModelConfig(
        vocab_size=900,
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
    )
    tokenizer = train_tokenizer(texts, vocab_size=900, out_dir=folder, max_length=POSITIONS)
    build_scratch_model(config, tokenizer, folder, seed=11)


def test_predictions_are_the_harness_own_question_for_question(data_dir: Path, tmp_path: Path) -> None:
    build_model(tmp_path)
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["lm_eval"] == "0.4.13"
    assert hash_weight_files(tmp_path) == record["weights_sha256"], "another model than the recorded one: record again"
    tokenizer = load_tokenizer(str(tmp_path))
    predicted: dict[str, str] = {}
    logprobs: dict[str, tuple[float, ...]] = {}
    for name in ("ceval", "cmmlu"):
        config = BenchmarkConfig(name=name, path=str(data_dir / name), max_questions=record["max_questions"])
        benchmark, template = load_benchmark(config), TEMPLATES["lm_eval", name]
        tokens = find_answer_tokens(tokenizer, str(tmp_path), cue="\n" + template.cue, prefix=template.answer_prefix)
        ids = encode_prompts(tokenizer, format_prompts(benchmark, style="lm_eval"), add_special_tokens=False)
        spec = EngineSpec(str(tmp_path), "main", "transformers", "float32", 0, tokens.letters, POSITIONS)
        answers = open_engine(spec).ask([[*found, *tokens.appended] for found in ids], [1] * len(ids))
        for question, answer in zip(benchmark.questions, answers, strict=True):
            predicted[f"{name}/{question.id}"] = pick_letter(answer.letter_logprobs)
            logprobs[f"{name}/{question.id}"] = answer.letter_logprobs
    assert len(predicted) == record["max_questions"] * (52 + 67)
    assert predicted == {key: found["predicted"] for key, found in record["answers"].items()}
    assert len(set(predicted.values())) == 4, "the model must answer with every letter, or this proves little"
    for key, found in record["answers"].items():
        theirs = [value - found["logprobs"][0] for value in found["logprobs"]]
        mine = [value - logprobs[key][0] for value in logprobs[key]]
        assert mine == pytest.approx(theirs, abs=1e-4), key


if __name__ == "__main__":
    build_model(Path(sys.argv[1]))
