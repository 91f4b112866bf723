"""What a reader who knows nothing yet sees of a run: one line first, colours that mean something, bounds beside numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from layerplan.config.plan import ExplicitPlanConfig
from layerplan.plan.layer_profile import ModelIdentity, ModelSource
from layerplan.plan.loss_recipe import LOSS_BOUNDS
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.report.answer_tables import show_text
from layerplan.report.answers import Answers, HeldOutText, ValidationLoss, read_answers, read_verdicts
from layerplan.report.headline import list_clauses, say_headline
from layerplan.report.html_parts import render_table
from layerplan.report.page import write_report
from layerplan.run_folder import RunFolder
from layerplan.train.exactness import compare_losses
from tests.qwen3 import TINY_QWEN3

TEXT = {"difference_interval": [-0.0213, -0.0062], "adjusted_p": 0.002, "base": 1.0, "trained": 0.9903}
OLD = "better than the base: 0.9903 against 1.0000 bits per byte (-0.0097 ± 0.0076, p = 0.002, 12 documents)"
NEW = "better than the base: 0.9903 against 1.0000 bits per byte (-0.0097 [95 %: -0.0213, -0.0062], p = 0.002, 12 documents)"


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def make_text(name: str, change: float, p: float, sentence: str = "...") -> HeldOutText:
    return HeldOutText(name, 12, 1.0, 1.0 + change, (change, change), p, sentence)


def make_answers(*texts: HeldOutText, validation: ValidationLoss | None = None) -> Answers:
    return Answers(final_step=5, validation=validation, held_out=texts, cost=None, continuations=())


def make_verdict(difference: float, p: float, protocol: str = "logit") -> dict[str, Any]:
    return {"benchmark": "ceval", "protocol": protocol, "difference": difference, "adjusted_p": p}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished training of 5 steps on a de-quantised base."""
    folder = RunFolder(tmp_path / "run")
    source = ModelSource(file="small.Q4_1.gguf", sha256="a" * 64, tensor_types={"Q4_1": 4})
    model = ModelIdentity(name="small", model_type="qwen3", num_layers=3, source=source)
    make_plan(ExplicitPlanConfig(trainable=[0]), model=model, shape=ModelShape.from_hf_config(TINY_QWEN3)).save(
        folder.plan
    )
    training = {"final_step": 5, "tokens_seen": 50, "first_loss": 4.0, "final_loss": 3.0, "skipped_steps": 0}
    write(folder.training, training | {"worlds": [[0, 2]], "proof": {"self_tests": 1, "self_test_difference": 0.0445}})
    write(folder.self_test, {"loss_alone": 14.75, "loss": 14.75 + 3e-6})
    write(folder.config, {"train": {"compute_dtype": "bfloat16"}})
    return folder


def read_page(run: RunFolder) -> str:
    return re.sub(r' data-label="[^"]*"', "", write_report(run.root).read_text(encoding="utf-8"))


def test_one_line_says_what_got_better_and_what_worse() -> None:
    """Fewer bits and more right answers are better; without a small p nothing is either."""
    texts = [make_text("general", 0.05, 0.002), make_text("target", -0.4, 0.002), make_text("third", -0.1, 0.2)]
    few = make_text("few", -0.5, 0.5, "not judged, as 3 documents are too few to resample (at least 10): ...")
    verdicts = [make_verdict(6.2, 0.01), make_verdict(-6.2, 1.0, "generate")]
    assert say_headline(list_clauses(make_answers(*texts, few), verdicts)) == (
        "Better than its base on the text target and the benchmark ceval/logit; worse than its base on the text general;"
        " no difference from its base could be told on the text third and the benchmark ceval/generate; too few documents"
        " to judge the text few."
    )


def test_a_text_without_a_finite_loss_is_not_said_to_have_too_few_documents() -> None:
    reason = (
        "not judged, as the trained model's loss is not finite on 1 of 12 documents: nan against 1.0000 bits per byte"
    )
    text = make_text("target", float("nan"), 1.0, reason)
    assert say_headline(list_clauses(make_answers(text), [])) == (
        "No finite loss, and so no judgement, on the text target."
    )


def test_a_run_compared_with_nothing_says_what_its_loss_did() -> None:
    answers = make_answers(validation=ValidationLoss(4, 4.0, 3.0))
    assert say_headline(list_clauses(answers, [])) == (
        "Validation loss 25 % lower; nothing else was compared with the base."
    )
    assert say_headline(list_clauses(make_answers(), [])) == ""


def test_the_page_begins_with_the_line_and_colours_each_verdict(run: RunFolder) -> None:
    better = TEXT | {"name": "target", "sentence": NEW}
    worse = {"name": "general", "base": 1.0, "trained": 1.05, "difference_interval": [0.02, 0.07], "adjusted_p": 0.002}
    write(run.held_out_verdicts, [worse | {"sentence": "worse than the base: ..."}, better])
    config = json.loads(run.config.read_text())
    write(run.config, config | {"evaluation": {"held_out": [{"name": "target"}, {"name": "general"}]}})
    page = read_page(run)
    lead = (
        '<p class="lead"><span class="better">Better than its base on the text target</span>; '
        '<span class="worse">worse than its base on the text general</span>.</p>'
    )
    assert lead in page and page.index(lead) < page.index("<h2>")
    assert f'<p class="verdict better">target: {NEW}.</p><p class="verdict worse">general: worse' in page
    assert "Note: the base was de-quantised from small.Q4_1.gguf, so a part of any gain may repair" in page


def test_sentences_of_earlier_versions_show_both_ends_too(run: RunFolder) -> None:
    write(run.held_out_verdicts, [TEXT | {"name": "target", "sentence": OLD}])
    assert [text.sentence for text in read_answers(run.root).held_out] == [NEW]
    verdict = make_verdict(-10.0, 0.01) | {"difference_interval": [-16.0, -3.0]}
    write(run.verdicts, [verdict | {"sentence": "run is worse than the base by 10.0 ± 6.5 points (p = 0.01)."}])
    (shown,) = read_verdicts(run)
    assert shown["sentence"] == "run is worse than the base (-10.0 [95 %: -16.0, -3.0] points, p = 0.01)."
    verdict = make_verdict(6.2, 1.0) | {"difference_interval": [-12.5, 25.0]}
    sentence = "run is not distinguishable from the base ({}, p = 1); no better than guessing."
    write(run.verdicts, [verdict | {"sentence": sentence.format("+6.2 ± 18.8 points")}])
    assert read_verdicts(run)[0]["sentence"] == sentence.format("+6.2 [95 %: -12.5, +25.0] points")


def test_a_difference_of_losses_stands_beside_its_loss_and_its_bound(run: RunFolder) -> None:
    """0.0445 of 14.75 nats is 0.3 %, within the 2 % that bfloat16 may round by."""
    page = read_page(run)
    assert (
        "<td>the same on the workers&#x27; placed model, in bfloat16, at most</td><td>0.0445 nats per token apart, 0.3% of the"
        " loss; up to 2.0% is bfloat16&#x27;s rounding, more would have ended the run</td>"
    ) in page
    assert "<td>3e-06 nats per token apart, 2e-07 of the loss; up to 1e-04 is float32&#x27;s rounding" in page
    run.self_test.unlink()
    write(run.config, {})
    assert "placed model, at most</td><td>0.0445 nats per token apart</td>" in read_page(run)


@pytest.mark.parametrize("dtype", LOSS_BOUNDS)
def test_the_bound_on_the_page_is_the_one_that_ends_a_run(dtype: str) -> None:
    bound = LOSS_BOUNDS[dtype]
    assert compare_losses(10.0, 10.0 * (1 + 0.99 * bound), getattr(torch, dtype)) is None
    assert compare_losses(10.0, 10.0 * (1 + 1.01 * bound), getattr(torch, dtype)) is not None


@pytest.mark.parametrize(
    ("worlds", "shown"),
    [([[0, 2]], "2 workers"), ([[0, 1]], "1 worker"), ([[0, 2], [10, 4]], "2 workers, 4 from step 11 on")],
)
def test_the_row_on_workers_says_their_number_once(run: RunFolder, worlds: list[list[int]], shown: str) -> None:
    write(run.training, json.loads(run.training.read_text()) | {"worlds": worlds})
    assert f"<td>trained by</td><td>{shown}</td>" in read_page(run)


def test_named_cells_of_the_layer_map_have_room_for_their_names(run: RunFolder) -> None:
    page = read_page(run)
    assert re.findall(r'<div class="cell named \w+">(\w+)</div>', page) == ["embed", "norm", "head"]
    assert re.findall(r'<div class="cell (\w+)">(\d)</div>', page) == [("on", "0"), ("off", "1"), ("off", "2")]


def test_a_continuation_begins_with_its_first_words() -> None:
    assert show_text("\n \n\n  two\n\n\n\nthree\n") == "  two\n\nthree"


def test_cells_of_wide_tables_carry_their_headings_for_narrow_screens() -> None:
    wide = render_table(["a", 'b"', "c", "d"], [["1", "2", "3", "<4"]])
    assert '<table class="stack">' in wide and '<td data-label="b&quot;">2</td>' in wide and ">&lt;4</td>" in wide
    narrow = render_table(["a", "b"], [["1", "2"]])
    assert narrow.startswith('<div class="scroll"><table class="facts">') and "data-label" not in narrow


@pytest.mark.parametrize("path, is_said", [("builtin", True), ("hub", False)])
def test_our_own_questions_are_not_taken_for_the_benchmark_whose_format_they_have(
    run: RunFolder, path: str, is_said: bool
) -> None:
    verdict = make_verdict(6.2, 1.0) | {"num_questions": 16, "difference_interval": [-19.8, 32.3], "sentence": "alike"}
    scores: dict[str, Any] = dict.fromkeys(("accuracy", "reference_accuracy"), 25.0)
    scores |= {name: [10.2, 49.5] for name in ("accuracy_interval", "reference_interval")}
    write(run.verdicts, [verdict | scores])
    write(run.config, {"evaluation": {"benchmarks": [{"name": "ceval", "path": path}]}})
    page = write_report(run.root).read_text(encoding="utf-8")
    assert ("a small set of layerplan&#x27;s own questions in the benchmark&#x27;s format was asked" in page) is is_said
