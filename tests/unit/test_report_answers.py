"""What a reader asks first of a run: the same numbers on the page, on the console, in the model card and in the lineage."""

from __future__ import annotations

import html
import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from layerplan.config.plan import FreezeDeepPlanConfig
from layerplan.pipeline.summary import print_answers
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan, predict_beside_full
from layerplan.report.answer_tables import describe_cost, describe_texts, list_metrics, tabulate_cost, tabulate_texts
from layerplan.report.answers import read_answers
from layerplan.report.card import BEGIN, END, add_results
from layerplan.report.lineage import fit_sections, list_results, render_note, render_sweep
from layerplan.report.page import write_report
from layerplan.run_folder import COST_NAME, PLAN_NAME
from tests.qwen3 import QWEN3_0P6B, QWEN3_0P6B_IDENTITY

SHAPE = ModelShape.from_hf_config(QWEN3_0P6B)
PROMPT, SAID = "a | b", "x < y\n```\n二\u2028三"
SENTENCE = "better than the base: 1.2000 against 1.5000 bits per byte (-0.3000 [95 %: -0.3500, -0.2500], p = 0.002, 12 documents)"


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")


def without_labels(page: str) -> str:
    """The page without what narrow screens show beside cells."""
    return re.sub(r' data-label="[^"]*"', "", page)


def make_plan_for(seq_len: int) -> FreezePlan:
    return make_plan(FreezeDeepPlanConfig(boundary=14), model=QWEN3_0P6B_IDENTITY, shape=SHAPE, seq_len=seq_len)


def leave_run(folder: Path, *, planned_for: int = 256, rows_of: int = 256) -> Path:
    """The artifacts of a run that trained 100 s at a quarter of the full rate, scored on one held-out text."""
    plan = make_plan_for(planned_for)
    plan.save(folder / PLAN_NAME)
    write(folder / COST_NAME, predict_beside_full(plan, SHAPE, rows_of).model_dump())
    write(
        folder / "training.json",
        {
            "final_step": 20,
            "final_checkpoint": "checkpoints/step_00000020",
            "first_loss": 5.0,
            "final_loss": 4.0,
            "base_validation_loss": 4.0,
            "validation_loss": 3.0,
            "tokens_seen": 5_000,
            "train_s": 100.0,
            "tokens_per_s": 50.0,
            "mfu": 0.25,
            "skipped_steps": 0,
            "proof": {},
        },
    )
    write(
        folder / "token_store" / "manifest.json",
        {"num_validation_rows": 8, "counts": {}, "num_rows": 1, "num_tokens": 1},
    )
    for step, peak in ((1, 1.5), (20, 1.75)):
        line = {
            "run": "train",
            "step": step,
            "train/loss": 5.0,
            "perf/peak_memory_gib": peak,
            "perf/predicted_memory_gib": 2.0,
        }
        with (folder / "metrics.jsonl").open("a") as handle:
            handle.write(json.dumps(line) + "\n")
    marks = {"a": {"size": 2**30}, "b": {"size": 2**29}}
    write(folder / "checkpoints" / "step_00000020" / "seal.json", {"files": marks})
    verdict = {"name": "notes", "base": 1.5, "trained": 1.2, "difference_interval": [-0.35, -0.25], "adjusted_p": 0.002}
    write(folder / "evaluation" / "held_out_verdicts.json", [verdict | {"sentence": SENTENCE}])
    write(
        folder / "evaluation" / "base" / "held_out" / "notes.json", {"document_bytes": [10] * 12, "bits_per_byte": 1.5}
    )
    for label, said in (("base", ""), ("step_00000010", "old"), ("step_00000020", SAID)):
        write(folder / "evaluation" / label / "ceval.json", {})
        write(folder / "evaluation" / label / "continuations.jsonl", {"prompt": PROMPT, "text": said})
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return leave_run(tmp_path_factory.mktemp("runs") / "r<un")


def test_the_text_before_and_after_is_the_same_everywhere(finished: Path) -> None:
    answers = read_answers(finished)
    page = write_report(finished).read_text(encoding="utf-8")
    card = add_results("# Card\n", answers, ["ceval/logit: no better"])
    out = StringIO()
    print_answers(answers, Console(file=out, width=140))
    shown = re.sub(r"\s+", " ", out.getvalue())
    for value in (
        "4.0000",
        "3.0000",
        "-1.0000",
        "1.5000",
        "1.2000",
        "-0.3000 [-0.3500, -0.2500]",
        "0.002",
        "12 documents",
    ):
        assert value in page and value in shown and value.replace("[", r"\[").replace("]", r"\]") in card, value
    loss = "Validation loss: 4.0000 before the first step, 3.0000 after the last (25 % lower)."
    for line in (loss, f"notes: {SENTENCE}."):
        assert line in page and line in card.replace("\\", "") and line in shown, line
    assert "- ceval/logit: no better" in card
    metrics = list_metrics(answers)
    assert metrics["result/validation_loss/base"] == 4.0 and metrics["result/validation_loss/trained"] == 3.0
    assert metrics["result/notes/bits_per_byte/difference_low"] == -0.35
    assert metrics["result/notes/bits_per_byte/adjusted_p"] == 0.002


def test_what_was_promised_stands_beside_what_it_took(finished: Path) -> None:
    """A quarter of the full rate for 100 s: at that rate 25 s. Sizes are those of the seal, memory the largest logged."""
    cost = read_answers(finished).cost
    assert cost is not None and cost.least_train_s == 25.0
    rows = {name: values for name, *values in tabulate_cost(cost)[1]}
    assert rows["time in steps"] == [
        "25 s at the workers' full rate",
        "100 s, 50 tokens per second, 25% of the workers' full rate (MFU)",
    ]
    assert rows["memory of a worker"] == ["2.00 GiB", "1.75 GiB at its peak"]
    assert rows["a checkpoint on disk"][1] == "1.50 GiB"
    assert list_metrics(read_answers(finished))["cost/checkpoint_gib/measured"] == 1.5
    assert not [name for name in rows if "made for" in name]


def test_a_plan_that_travelled_shows_both_lengths(tmp_path: Path) -> None:
    """Longer rows give attention more keys per token, so one plan has two prices; the run's own comes first."""
    cost = read_answers(leave_run(tmp_path, planned_for=4096, rows_of=256)).cost
    assert cost is not None and cost.work_elsewhere is not None
    assert (cost.work.seq_len, cost.work_elsewhere.seq_len) == (256, 4096)
    assert cost.work.flops_per_token < cost.work_elsewhere.flops_per_token
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "work in rows of 256 tokens<" in page and "work in rows of 4,096 tokens; the plan was made for these" in page
    assert " in rows of 256 tokens, " in describe_cost(cost) and " in rows of 4,096 tokens, " in describe_cost(cost)


def test_what_runs_are_compared_by_is_in_the_lineage(tmp_path: Path) -> None:
    run = leave_run(tmp_path)
    verdict = {"benchmark": "ceval", "protocol": "logit", "accuracy": 40.0, "accuracy_interval": [30.0, 50.0]}
    verdict |= {"reference_accuracy": 35.0, "reference_interval": [25.0, 45.0], "adjusted_p": 0.5}
    verdict |= {"difference": 5.0, "difference_interval": [-3.0, 13.0], "sentence": "no better: +5.0 points"}
    write(run / "verdicts.json", [verdict])
    numbers = list_results(run, read_answers(run))
    accuracy = "result/ceval/logit/accuracy"
    assert [numbers[f"{accuracy}/trained{end}"] for end in ("_low", "", "_high")] == [30.0, 40.0, 50.0]
    assert [numbers[f"{accuracy}/base{end}"] for end in ("_low", "", "_high")] == [25.0, 35.0, 45.0]
    assert numbers[f"{accuracy}/difference_low"] == -3.0 and numbers[f"{accuracy}/adjusted_p"] == 0.5
    assert (numbers["result/train_loss/first"], numbers["result/train_loss/final"]) == (5.0, 4.0)
    assert (numbers["cost/tokens_per_s/measured"], numbers["cost/mfu/measured"]) == (50.0, 0.25)
    assert numbers["result/tokens_seen"] == 5000 and numbers["cost/memory_gib/measured"] == 1.75
    assert 0 < numbers["cost/share_of_full/predicted"] < 1 and numbers["result/notes/bits_per_byte/trained"] == 1.2


def test_a_description_says_what_a_run_has_come_to(tmp_path: Path) -> None:
    make_plan_for(256).save(tmp_path / PLAN_NAME)
    planned = render_note(tmp_path, read_answers(tmp_path))
    assert "under a `freeze_deep` plan." in planned and "Better than its base?" not in planned and "![" not in planned
    run = leave_run(tmp_path)
    write_report(run)
    note = render_note(run, read_answers(run))
    assert "plan, trained for 20 steps." in note and "- notes: better than the base: 1.2000 against 1.5000" in note
    assert "![loss](get-artifact?run_uuid={run_id}&path=figures%2Floss.png)" in note
    assert len(note) <= 5000


def test_a_description_leaves_out_what_does_not_fit_and_says_so() -> None:
    assert fit_sections(["a", "b"]) == "a\n\nb"
    assert fit_sections(["a", "b" * 5000, "c"]) == "a\n\nc\n\nThe rest is in `report.html` among the artifacts."
    trials = [
        {
            "name": f"boundary_{number:02d}",
            "validation_loss": None,
            "train_loss": 2.0,
            "flops_share": 0.5,
            "tokens_per_s": None,
        }
        for number in range(1, 400)
    ]
    table = render_sweep(trials)
    assert len(table) <= 5000 and "| boundary\\_01 | - | 2.0000 | 50.0% | - |" in table


def test_prompts_stand_side_by_side_as_they_came(finished: Path) -> None:
    """The newest checkpoint speaks for the result; an empty answer is said to be one; nothing of it becomes markup."""
    answers = read_answers(finished)
    assert [(item.prompt, item.base, item.trained) for item in answers.continuations] == [(PROMPT, "", SAID)]
    page = write_report(finished).read_text(encoding="utf-8")
    row = f"<td>{PROMPT}</td><td>(nothing: the model ended the text at once)</td><td>{html.escape(SAID)}</td>"
    assert row in without_labels(page)
    assert "<th>trained, step 20</th>" in page and "r<un" not in page
    card = add_results("", answers, [])
    assert f"````text\n{SAID}\n````" in card, "the fence is longer than the one in the text"


def test_a_card_gets_its_results_once_and_keeps_what_is_around_them(finished: Path) -> None:
    answers = read_answers(finished)
    first = add_results("# Card\n\nMine.\n", answers, ["a"])
    again = add_results(first + "\nMore of mine.\n", answers, ["b"])
    assert again.startswith("# Card\n\nMine.\n") and again.endswith(f"{END}\nMore of mine.\n")
    assert again.count(BEGIN) == again.count(END) == 1 and "- b" in again and "- a\n" not in again
    assert add_results(again, answers, ["b"]) == again


def test_a_run_of_an_earlier_version_shows_what_it_has(tmp_path: Path) -> None:
    """No loss before the first step, no cost for its own rows, no seal, nothing continued."""
    folder = leave_run(tmp_path)
    for name in (COST_NAME, "checkpoints/step_00000020/seal.json", "evaluation/base/continuations.jsonl"):
        (folder / name).unlink()
    for label in ("step_00000010", "step_00000020"):
        (folder / "evaluation" / label / "continuations.jsonl").unlink()
    training = json.loads((folder / "training.json").read_text())
    del training["base_validation_loss"]
    write(folder / "training.json", training)
    answers = read_answers(folder)
    page = write_report(folder).read_text(encoding="utf-8")
    assert "<td>not measured</td><td>3.0000</td><td>–</td>" in without_labels(page)
    assert describe_texts(answers) == [f"notes: {SENTENCE}."]
    assert answers.cost is not None and answers.cost.work.seq_len == 256 and answers.cost.checkpoint_gib is None
    assert answers.continuations == () and "What it says now" not in page


def test_a_run_that_has_only_a_plan_shows_what_it_will_cost(tmp_path: Path) -> None:
    make_plan_for(512).save(tmp_path / PLAN_NAME)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "What it will cost" in page and "work in rows of 512 tokens" in page
    assert "Is it better than before?" not in page and list_metrics(read_answers(tmp_path))["cost/rows_seq_len"] == 512


def test_a_run_without_any_text_says_so(tmp_path: Path) -> None:
    folder = leave_run(tmp_path)
    (folder / "evaluation" / "held_out_verdicts.json").unlink()
    training = json.loads((folder / "training.json").read_text())
    write(folder / "training.json", training | {"validation_loss": None, "base_validation_loss": None})
    page = write_report(folder).read_text(encoding="utf-8")
    assert "Not measured: the corpus has no validation rows and there is no held-out text." in page


def test_a_text_that_cannot_be_judged_has_no_interval(tmp_path: Path) -> None:
    folder = leave_run(tmp_path / "run")
    verdict = {"name": "notes", "base": 1.5, "trained": 1.2, "difference_interval": None, "adjusted_p": 1.0}
    words = "not judged, as 1 documents are too few (at least 10): 1.2000 against 1.5000 bits per byte"
    write(folder / "evaluation" / "held_out_verdicts.json", [verdict | {"sentence": words}])
    page = write_report(folder).read_text(encoding="utf-8")
    assert words in page and ">-0.3000<" in page
    answers = read_answers(folder)
    assert "result/notes/bits_per_byte/difference_low" not in list_metrics(answers)
    assert "result/notes/bits_per_byte/adjusted_p" not in list_metrics(answers), (
        "nothing was tested, not even with p = 1"
    )
    assert [row[-1] for row in tabulate_texts(answers)[1] if row[0].startswith("notes")] == ["–"]
