"""`evaluation.dtype: auto` is another precision on a GPU than on a CPU: what a score says, and which one is read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.artifacts import load_results, write_results
from eval.held_out import HeldOutResult, is_held_out_scored
from eval.held_out_scoring import _describe_texts, _is_scored
from eval.items import load_benchmark
from eval.runner import _describe_origins, _read_finished, make_protocol_id
from eval.scoring import Answer, score_answers
from layerplan.artifacts import write_json
from layerplan.config.evaluation import EvaluationConfig
from layerplan.models.ref import ModelRef
from layerplan.run_folder import HELD_OUT_NAME
from tests.model_folders import save_tiny_base
from tests.tiny_corpus import make_byte_tokenizer

ON = {"cpu": {"num_gpus_per_actor": 0.0}, "gpu": {"num_gpus_per_actor": 1.0}}


@pytest.fixture
def model(tmp_path: Path) -> ModelRef:
    base = save_tiny_base(tmp_path / "base", vocab_size=300)
    make_byte_tokenizer(base)
    return ModelRef(str(base))


def make_config(folder: Path, **values: object) -> EvaluationConfig:
    text = folder / "text.jsonl"
    text.write_text(json.dumps({"id": "a", "text": "tides"}) + "\n", encoding="utf-8")
    return EvaluationConfig.model_validate(
        {
            "benchmarks": [{"name": "ceval", "path": "builtin", "max_questions": 1}],
            "protocols": ["logit"],
            "backend": "transformers",
            "held_out": [{"name": "notes", "source": {"path": str(text)}}],
            **values,
        }
    )


def leave_scores(model: ModelRef, config: EvaluationConfig, out: Path, *, recorded: str | None = None) -> None:
    """Scores as evaluation leaves them; `recorded` stands for what an earlier version wrote as their precision."""
    benchmark = load_benchmark(config.benchmarks[0], num_few_shot=0)
    origin = _describe_origins(model, [benchmark], config)["ceval"]
    answers = [
        Answer(id=each.id, prompt="", output="", predicted="A", answer=each.answer) for each in benchmark.questions
    ]
    protocol_id = make_protocol_id(benchmark, "logit", config)
    origin = origin.model_copy(update={"dtype": recorded or origin.dtype})
    results = {"ceval/logit": score_answers(benchmark, "logit", protocol_id, [answers], origin=origin)}
    write_results(out, "ceval", results, {"logit": answers})
    measured = {"window": 8, "bits_per_byte": 1.0, "num_tokens": 5, "document_nats": [3.0], "document_bytes": [5]}
    text = _describe_texts(model, config)[0]
    values = text.origin | measured | {"dtype": recorded or text.origin["dtype"]}
    write_json(out / HELD_OUT_NAME / "notes.json", HeldOutResult.model_validate(values).model_dump(mode="json"))


def are_read_back(model: ModelRef, config: EvaluationConfig, out: Path) -> bool:
    benchmark = load_benchmark(config.benchmarks[0], num_few_shot=0)
    origin = _describe_origins(model, [benchmark], config)["ceval"]
    answered = _read_finished(load_results(out), benchmark, config, origin) is not None
    before = HeldOutResult.model_validate_json((out / HELD_OUT_NAME / "notes.json").read_text(encoding="utf-8"))
    texts = [_is_scored(_describe_texts(model, config)[0], before, config), is_held_out_scored(config, out)]
    assert texts == [answered, answered]
    return answered


@pytest.mark.parametrize(("scored", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16")])
@pytest.mark.parametrize("asked", ["cpu", "gpu"])
def test_auto_is_recorded_as_what_it_is_and_read_back_on_the_same_kind_of_device(
    model: ModelRef, tmp_path: Path, scored: str, dtype: str, asked: str
) -> None:
    out = tmp_path / "out"
    leave_scores(model, make_config(tmp_path, **ON[scored]), out)
    origin = load_results(out)["ceval/logit"].origin
    assert origin is not None and origin.dtype == dtype
    assert json.loads((out / HELD_OUT_NAME / "notes.json").read_text(encoding="utf-8"))["dtype"] == dtype
    assert are_read_back(model, make_config(tmp_path, **ON[asked]), out) is (scored == asked)
    assert are_read_back(model, make_config(tmp_path, dtype=dtype, **ON[asked]), out)


@pytest.mark.parametrize(
    ("asked", "believed"),
    [
        (ON["cpu"], True),
        (ON["gpu"], False),
        (ON["cpu"] | {"dtype": "float32"}, False),
        (ON["gpu"] | {"dtype": "bfloat16"}, False),
    ],
)
def test_a_score_that_says_auto_alone_is_believed_by_auto_on_a_cpu(
    model: ModelRef, tmp_path: Path, asked: dict[str, object], believed: bool
) -> None:
    """Versions that recorded `auto` did not say where: on a CPU float32 is the only reading."""
    out = tmp_path / "out"
    leave_scores(model, make_config(tmp_path, **ON["cpu"]), out, recorded="auto")
    assert are_read_back(model, make_config(tmp_path, **asked), out) is believed
