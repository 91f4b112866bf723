"""The race of fine-tuning methods: its arms are configs that load, and its tables say what is done and what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from salf_race import Race, decode, share_told, share_told_by_chance  # noqa: E402
from salf_tables import Results, load_results, render_race, render_values, render_verdicts  # noqa: E402

GOLD = "0101" * 10
ARM: dict[str, Any] = {"deviation": [1.0, 0.5], "propagated_rows": [2, 2], "seconds": {"all": 60.0}}


@pytest.mark.parametrize("name", ["salf_scratch", "salf_smollm2"])
def test_every_arm_is_a_config_that_loads_and_has_a_folder_of_its_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LAYERPLAN_DATA", str(tmp_path))
    race = Race.load(ROOT / "benchmarks" / "races" / f"{name}.yaml")
    arms = race.list_arms()
    assert len({arm.folder for arm in arms}) == len({arm.key for arm in arms}) == len(arms)
    assert [arm.seed for arm in arms] == sorted(arm.seed for arm in arms), "a race that is cut has whole seeds"
    by_method = {arm.method: race.configure(arm, tmp_path, "base") for arm in arms if arm.seed == 0}
    for method, config in by_method.items():
        assert config.finetune is not None
        assert config.finetune.uses_lora == ("LoRA" in method)
        assert config.train.optimizer.learning_rate == race.values["rates"]["lora" if "LoRA" in method else "full"]


def make_results(arms: dict[str, tuple[str, ...]]) -> Results:
    """Arms of one task, a line of predictions per seed; the shares are counted here by hand."""
    known: dict[str, Any] = {
        "base": {"num_layers": 2, "model_type": "tiny", "sha256": "f" * 64},
        "where": {"cpu": "one"},
    }
    facts = {"sha256": "a" * 64, "classes": ["a", "b"], "rows": 4, "gold": GOLD, "base_accuracy": 0.0}
    known |= {"tasks": {"task": facts | {"base_deviation": [1.0, 0.9]}}, "arms": {}}
    for method, seeds in arms.items():
        for seed, predicted in enumerate(seeds):
            right = sum(one == other for one, other in zip(GOLD, predicted, strict=True)) / len(GOLD)
            scores = {"accuracy": right, "macro_f1": right, "predicted": predicted}
            saved = {"depth": 0.25, "flops": 0.2}
            known["arms"][f"task | {method} | {seed}"] = {**ARM, **scores, "planned": saved, "counted": saved}
    return Results("tiny", known, {"tasks": {"task": {}}, "seeds": [0, 1], "arms": dict.fromkeys(arms)})


def test_a_table_has_means_over_seeds_and_says_which_are_missing() -> None:
    half = "01--" * 10
    results = make_results({"SALF[half]": (GOLD, half), "LIFT[half]": (half,), "full": ()})
    table = render_values(results, ["SALF[half]", "LIFT[half]", "full"], "accuracy")
    assert "| SALF[half] | 0.750 (0.500 to 1.000) | 0.750 |" in table
    assert "| LIFT[half] | 0.500, 1 of 2 | 0.500 |" in table and "full" not in table
    assert decode("0-1") == [0, -1, 1]
    page = render_race(results)
    assert "3 of 6 planned arms are done, in 3 minutes beside other work." in page
    assert "| SALF[half] | 0.250 | 0.250 | 0.200 | 0.200 |" in page
    assert "| task, base | 1.00 | 0.90 |" in page


def test_a_verdict_is_of_the_seeds_that_both_arms_have() -> None:
    """One seed of each: the accuracy's test is the exact one of McNemar, of 20 prompts that one side has right."""
    results = make_results({"SALF[half]": (GOLD, GOLD), "LIFT[half]": ("01--" * 10,), "full": (GOLD, GOLD)})
    rows = [line for line in render_verdicts(results, ["LIFT[half]", "full"]).splitlines() if "accuracy" in line]
    assert rows[0].startswith("| task | LIFT[half] | 1 | accuracy | -0.500 [") and "worse than SALF" in rows[0]
    assert float(rows[0].split("|")[6]) == pytest.approx(4 * 2 * 0.5**20, rel=0.01), "the smallest of four, by Holm"
    assert rows[1].startswith("| task | full | 2 | accuracy | +0.000 [") and "not told apart" in rows[1]


def test_what_a_layer_tells_of_the_label() -> None:
    labels = [0, 0, 1, 1] * 25
    assert share_told(labels, labels) == pytest.approx(1)
    assert share_told(labels, [0, 1] * 50) == pytest.approx(0, abs=1e-12)
    assert share_told([0, 0, 1, 1], [0, 0, 0, 1]) == pytest.approx(0.311, abs=5e-4), "1 - (3/4) H(1/3) / H(1/2)"
    assert share_told_by_chance(labels, labels) < 0.05


def test_kept_results_are_of_planned_arms() -> None:
    for path in sorted((ROOT / "benchmarks" / "results" / "salf").glob("*.json")):
        results = load_results(path)
        planned = {arm.key for arm in Race(results.planned).list_arms()}
        assert set(json.loads(path.read_text())["arms"]) <= planned
