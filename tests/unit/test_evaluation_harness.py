"""Scores in `lm_eval` style against what lm-evaluation-harness 0.4.13 answered, question for question.

The harness's answers were recorded on a model built from a seed (nothing of it is installed here):

    python tests/unit/test_evaluation_harness.py FOLDER [begins]
    python benchmarks/evaluation.py --harness PYTHON --model FOLDER --max-questions 2 --record \
        tests/unit/data/lm_eval_predictions.json    # lm_eval_begin_predictions.json with `begins`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import processors

from eval.encoding import encode_prompts, find_answer_tokens
from eval.engine import EngineSpec
from eval.items import load_benchmark
from eval.open_engine import open_engine
from eval.prompts import TEMPLATES, format_prompts
from eval.scoring import pick_letter
from layerplan.config.evaluation import BenchmarkConfig
from layerplan.config.model import ScratchModelConfig
from layerplan.models.causal_lm import load_tokenizer
from layerplan.models.files import hash_weight_files
from layerplan.models.ref import ModelRef
from layerplan.models.scratch import build_scratch_model, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "unit" / "data"
RECORDS = {False: "lm_eval_predictions.json", True: "lm_eval_begin_predictions.json"}
BEGIN = "<s>"
POSITIONS = 4096


def build_model(folder: Path, *, begins: bool) -> None:
    """Two layers over the questions written for this project; a vocabulary so small that " A" is two tokens.

    With `begins`, the tokenizer puts a token before every text, as those of Llama and Gemma do.
    """
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
    if begins:
        tokenizer.add_special_tokens([BEGIN])
        begin_id = tokenizer.token_to_id(BEGIN)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin_id)]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": BEGIN}), encoding="utf-8")
    build_scratch_model(config, tokenizer, folder, seed=11)


@pytest.mark.parametrize("begins", RECORDS, ids=["no begin token", "begin token"])
def test_predictions_are_the_harness_own_question_for_question(begins: bool, data_dir: Path, tmp_path: Path) -> None:
    build_model(tmp_path, begins=begins)
    record = json.loads((DATA / RECORDS[begins]).read_text(encoding="utf-8"))
    assert record["lm_eval"] == "0.4.13"
    assert hash_weight_files(tmp_path) == record["weights_sha256"], "another model than the recorded one: record again"
    tokenizer = load_tokenizer(str(tmp_path))
    predicted: dict[str, str] = {}
    logprobs: dict[str, tuple[float, ...]] = {}
    for name in ("ceval", "cmmlu"):
        config = BenchmarkConfig(name=name, path=str(data_dir / name), max_questions=record["max_questions"])
        benchmark, template = load_benchmark(config), TEMPLATES["lm_eval", name]
        tokens = find_answer_tokens(tokenizer, str(tmp_path), cue="\n" + template.cue, prefix=template.answer_prefix)
        ids = encode_prompts(
            tokenizer, format_prompts(benchmark, style="lm_eval"), add_special_tokens=True, control_tokens="token"
        )
        spec = EngineSpec(ModelRef(str(tmp_path)), "transformers", "float32", 0, tokens.letters, POSITIONS)
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
    build_model(Path(sys.argv[1]), begins=sys.argv[2:] == ["begins"])
