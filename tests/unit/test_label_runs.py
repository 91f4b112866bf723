"""Fine-tunings on labels beside each other, and each on its own page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from layerplan.errors import EvaluationError
from layerplan.pipeline.compare import compare
from layerplan.report.page import write_report
from tests.label_runs import leave_run

GOLD = ["odd", "even", "neither", "odd"] * 10
WRONG = ["?"] * 40
HALF = [name if row % 2 else "even" for row, name in enumerate(GOLD)]


def test_two_runs_and_their_base_are_judged_prompt_by_prompt(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Accuracies by hand: none, 20 of 40 (rows with an odd number are right), all; 20 prompts differ, all one way."""
    half = leave_run(tmp_path / "half", GOLD, WRONG, HALF)
    right = leave_run(tmp_path / "right", GOLD, WRONG, GOLD)
    compare([str(half), str(right)], out=str(tmp_path / "out.json"), table=str(tmp_path / "table.md"))
    found = {
        (each["run"], each["reference"], each["metric"]): each
        for each in json.loads((tmp_path / "out.json").read_text())
    }
    assert len(found) == 9, "two runs and the base make three pairs, each by three metrics"
    last = found["right", "half", "accuracy"]
    assert (last["value"], last["reference_value"], last["difference"]) == (1.0, 0.5, 0.5)
    assert last["num_prompts"] == 40 and last["interval"][0] > 0.3
    assert min(each["adjusted_p"] for each in found.values()) == pytest.approx(9 * 2 * 0.5**40), "Holm over all nine"
    assert all(each["adjusted_p"] < 0.01 for each in found.values())
    output = capsys.readouterr().out
    assert "right, accuracy: 100.0 differs from half's 50.0 (+50.0 [95 %: " in output
    assert "| half | 50.0 |" in (tmp_path / "table.md").read_text()


def test_seeds_of_an_arm_are_pooled_and_equal_runs_are_not_told_apart(tmp_path: Path) -> None:
    runs = [leave_run(tmp_path / f"run{seed}", GOLD, WRONG, HALF if seed else GOLD, seed=seed) for seed in range(2)]
    compare([str(run) for run in runs], out=str(tmp_path / "pooled.json"), pool_seeds=True)
    (accuracy,) = [each for each in json.loads((tmp_path / "pooled.json").read_text()) if each["metric"] == "accuracy"]
    assert accuracy["num_seeds"] == 2 and accuracy["value"] == 0.75 and accuracy["reference"] == "the base"
    again = leave_run(tmp_path / "again", GOLD, WRONG, HALF, seed=1)
    with pytest.raises(EvaluationError, match=r"has the config and the seed \(1\) of .*run1; --pool-seeds takes each"):
        compare([str(run) for run in (*runs, again)], pool_seeds=True)
    twins = [leave_run(tmp_path / name, GOLD, WRONG, HALF) for name in ("one", "two")]
    compare([str(run) for run in twins], out=str(tmp_path / "twins.json"))
    pair = [each for each in json.loads((tmp_path / "twins.json").read_text()) if each["reference"] == "one"]
    assert [each["adjusted_p"] for each in pair] == [1, 1, 1] and all(each["difference"] == 0 for each in pair)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            {"task_sha256": "b" * 64},
            r"is of the task numbers \(sha256 bbbbbbbbbbbb\), .* only runs of the same prompts",
        ),
        ({"weights": "v" * 64}, r"began from another base than"),
    ],
)
def test_runs_that_share_no_test_or_no_base_are_refused(tmp_path: Path, other: dict[str, str], words: str) -> None:
    runs = [leave_run(tmp_path / "one", GOLD, WRONG, HALF), leave_run(tmp_path / "two", GOLD, WRONG, HALF, **other)]
    with pytest.raises(EvaluationError, match=words) as told:
        compare([str(run) for run in runs])
    assert "\n" not in str(told.value)


def test_a_run_without_scores_and_arms_of_unequal_seeds_are_refused(tmp_path: Path) -> None:
    runs = [leave_run(tmp_path / f"run{seed}", GOLD, WRONG, HALF, seed=seed) for seed in range(3)]
    config = json.loads((runs[2] / "resolved_config.json").read_text())
    (runs[2] / "resolved_config.json").write_text(json.dumps(config | {"epochs": 2}))
    with pytest.raises(EvaluationError, match="1 seeds compared with 2; as many of both methods are needed"):
        compare([str(run) for run in runs], pool_seeds=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(EvaluationError, match=r"other: has no scores on labels; it is no finished fine-tuning"):
        compare([str(runs[0]), str(tmp_path / "other")])


def test_the_page_shows_scores_savings_and_deviations(tmp_path: Path) -> None:
    page = write_report(leave_run(tmp_path / "half", GOLD, WRONG, HALF)).read_text()
    page = re.sub(r' data-label="[^"]*"', "", page)
    for wanted in (
        "<h2>Does it name the labels?</h2><p>numbers: 40 prompts of 3 classes.</p>",
        '<p class="verdict better">Better than the base: 50.0 % of the labels named, against 0.0 % (+50.0 [95 %: +',
        "<td>accuracy</td><td>0.0 [0.0, 8.8]</td><td>50.0 [",
        "<td>+50.0 [",
        "<td>answers that are no label</td><td>40</td><td>0</td>",
        "<td>planned</td><td>33.3%</td><td>25.0%</td>",
        "<td>counted</td><td>33.3%</td><td>20.0%</td>",
        "<td>after layer 2</td><td>0.250</td><td>0.350</td>",
        "<td>neither</td><td>10</td><td>0</td><td>0</td>",
    ):
        assert wanted in page, wanted
