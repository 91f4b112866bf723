"""The study machine: which arms follow from a config, that finished ones are not trained again, and what tables say."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import study as machine
import study_pack
from study_plan import choose_layers, choose_rates, find_rate, load_study
from study_replay import Grid
from study_tables import (
    collect,
    compare,
    correlate_measurement,
    render_early,
    render_opposites,
    render_regret,
    render_spread,
)

from layerplan.errors import ConfigError
from layerplan.plan.layer_measurement import LayerMeasurement, MeasuringCost
from tests.model_folders import save_tiny_base
from tests.tiny_corpus import make_byte_tokenizer, make_text, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of a base with three layers that takes a second."""
    folder = tmp_path_factory.mktemp("study")
    base = save_tiny_base(folder / "base", vocab_size=257, eos_token_id=256)
    make_byte_tokenizer(base)
    for name, first in (("target", 0), ("source", 500)):
        records = ({"id": str(number), "text": make_text(number)} for number in range(first, first + 30))
        write_jsonl(folder / f"{name}.jsonl", *records)
    values = {
        "name": "tiny",
        "model": str(base),
        "target": {"path": str(folder / "target.jsonl")},
        "source": {"path": str(folder / "source.jsonl")},
        "seq_len": 32,
        "held_out_rows": 4,
        "early_rows": 2,
        "steps": 3,
        "rows_per_step": 1,
        "seeds": [0, 1],
        "boundaries": [1, 2],
        "rates": [1e-4, 1e-2],
        "rate_sizes": [1, 3],
        "read_at": [0.5],
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def open_study(path: Path, out: Path) -> machine.Study:
    return machine.Study(load_study(path), out)


def test_a_stopped_study_goes_on_and_trains_no_arm_twice(config_path: Path, tmp_path: Path):
    study = open_study(config_path, tmp_path)
    machine.run(study, max_arms=3)
    first = {path.name: path.stat().st_mtime_ns for path in (study.folder / "arms").iterdir()}
    assert len(first) == 3 and len(study.list_arms()) == 6  # the rate's arms alone are known
    again = open_study(config_path, tmp_path)
    machine.run(again, max_arms=None)
    arms = again.list_arms()
    assert len(arms) == 6 + 2 * (4 + 2) and all(again.load(arm) is not None for arm in arms)
    after = {path.name: path.stat().st_mtime_ns for path in (study.folder / "arms").iterdir()}
    assert first.items() <= after.items()
    text = machine.render(again)
    assert f"{len(arms)} of {len(arms)} arms that are known are done" in text
    assert "| full | 3 |" in text and "| shallow of 1 | 1 |" in text


def test_what_is_packed_is_found_elsewhere_and_names_no_folder_of_this_machine(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(study_pack, "PACKED", tmp_path / "packed")
    monkeypatch.setenv("LAYERPLAN_DATA", str(config_path.parent))
    study = open_study(config_path, tmp_path / "here")
    machine.run(study, max_arms=2)
    content = gzip.decompress(study_pack.pack(study.folder).read_bytes()).decode()
    assert str(config_path.parent) not in content and "$LAYERPLAN_DATA/target.jsonl" in content
    elsewhere = open_study(config_path, tmp_path / "elsewhere")
    done = [elsewhere.load(arm) for arm in elsewhere.list_arms()]
    assert [each["final"] for each in done if each] == [study.load(arm)["final"] for arm in study.list_arms()[:2]]


def test_a_base_that_learns_gets_better_and_is_given_back(config_path: Path, tmp_path: Path):
    study = open_study(config_path, tmp_path)
    machine.run(study, max_arms=2)
    low, high = (study.load(arm) for arm in machine.list_rate_arms(study.config, study.identity, study.shape)[:2])
    assert low is not None and high is not None
    assert low["train"][0] == pytest.approx(high["train"][0])  # both begin from the base
    assert high["train"][-1] != pytest.approx(low["train"][-1], abs=1e-4)
    assert len(low["final"]["target"]) == 4 and [*low["early"]] == ["2"] and len(low["early"]["2"]["source"]) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"boundaries": [3]}, r"boundaries=\[3\]: must lie in 1\.\.2"),
        ({"seeds": [7]}, r"seeds=\[7\]: must lie in 0\.\.4"),
    ],
)
def test_what_the_model_or_the_text_does_not_have_is_told_before_training(
    config_path: Path, tmp_path: Path, changes: dict[str, Any], words: str
):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(config_path.read_text()) | changes))
    with pytest.raises(ConfigError, match=words):
        open_study(path, tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_is_read(path: Path):
    assert load_study(path).name == path.stem


def test_a_measurement_trains_what_it_speaks_for_at_equal_flops_and_equal_layers(config_path: Path):
    config = load_study(config_path).model_copy(update={"flops_shares": [0.5, 0.05], "layer_counts": [2]})
    cost = MeasuringCost(seconds=None, flops=0.0, tokens=0)
    measurement = LayerMeasurement(name="noise", values=[3.0, 1.0, 4.0, 2.0], higher_trains=False, cost=cost)
    chosen = choose_layers(measurement, config, lambda layers: 0.2 * len(layers))
    assert chosen == [  # lowest first: 1, 3, 0, 2; nothing costs at most 0.05
        ("noise at 50%", [1, 3]),
        ("noise, 2 layers", [1, 3]),
        ("against noise, 2 layers", [0, 2]),
    ]


def test_the_rate_is_that_of_the_nearest_size_in_the_logarithm():
    rates = {3: 1e-3, 15: 5e-4, 30: 1e-4}
    assert [find_rate(rates, size) for size in (1, 6, 7, 21, 22)] == [1e-3, 1e-3, 5e-4, 5e-4, 1e-4]


def make_arm(
    label: str, layers: tuple[int, ...], loss: float, seed: int = 0, early: float | None = None
) -> dict[str, Any]:
    noise = np.random.default_rng(seed).normal(size=12)
    return {
        "label": label, "layers": layers, "trains_everything": False, "flops_share": 0.5, "rate": 1e-3, "seed": seed, "steps": 20,
        "final": {"target": (loss + noise).tolist()}, "early": {"2": {"target": [loss if early is None else early]}},
    }  # fmt: skip


def test_regret_is_paired_by_rows_and_seeds():
    arms = [make_arm("a", (0,), 2.0, seed) for seed in (0, 1)] + [make_arm("b", (1,), 2.1, seed) for seed in (0, 1)]
    arms.append(make_arm("c", (2,), 1.0))  # of one seed only: not compared
    losses = collect(arms, "target")
    assert set(losses) == {"a", "b"}
    gap, low, high, p = compare(losses["b"], losses["a"])
    assert (gap, low, high) == pytest.approx((0.1, 0.1, 0.1)) and p < 0.01  # rows vary by ten times as much
    table = render_regret(arms, "target")
    assert "| b | 1 | 50% | 0.001 |" in table and "0 of 1 other plans are not told from the best" in table


def test_noise_between_two_plans_is_found_in_one_of_twenty():
    rng = np.random.default_rng(5)
    p_values = [compare(rng.normal(size=24), rng.normal(size=24))[3] for _ in range(60)]
    assert sum(p < 0.05 for p in p_values) <= 8  # 3 expected, more than 8 by a chance of 0.3 %


def test_a_measurement_that_ranks_plans_as_training_does_correlates_with_it():
    arms = [make_arm(f"{layer}", (layer,), 2.0 - 0.1 * layer) for layer in range(5)]
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert correlate_measurement(values, arms, "target") == pytest.approx((1.0, 1.0, 1.0))
    assert correlate_measurement(values[::-1], arms, "target") == pytest.approx((-1.0, -1.0, -1.0))
    unequal = [make_arm(f"{size}", tuple(range(size)), 2.0) for size in range(1, 6)]
    assert correlate_measurement(values, unequal, "target") is None  # no two plans with as many layers


def test_a_replayed_search_finds_the_grids_best_and_pays_for_what_it_ran_alone():
    """One valley for each side, its bottom at boundary 6 of 12, deep trains better; the measurement knows both."""
    losses = {
        (side, k): 2.0 + 0.01 * (k - 6) ** 2 + (side == "shallow") for side in ("shallow", "deep") for k in range(1, 12)
    }
    arms = [
        {"label": f"{side} of {k}", "group": "grid", "seed": seed, "flops_share": 0.5, "final": {"target": [loss]}}
        for seed in (0, 1)
        for (side, k), loss in losses.items()
    ]
    grid = Grid(arms)
    wise = grid.replay(lambda point: -losses["shallow" if point.freeze == "deep" else "deep", point.boundary], 0.01)
    assert wise.regret == pytest.approx(0.0) and wise.flops <= 0.4
    assert grid.replay(lambda point: 0.0, 0.01).regret == pytest.approx(0.0)  # the rule alone, in the grid's order


def test_a_choice_is_compared_with_what_it_was_made_against():
    arms = [make_arm("wise, 2 layers", (3, 4), 2.0), make_arm("against wise, 2 layers", (0, 1), 2.3)]
    row = render_opposites([*arms, make_arm("deep of 3", (3, 4), 2.0)], "target").splitlines()[-1]
    assert "-0.3000" in row and row.startswith("| wise, 2 layers |")
    assert render_opposites(arms[:1], "target") == ""


def test_a_rate_is_tuned_over_both_sides():
    shallow, deep = {1e-4: 2.3, 5e-4: 2.2, 1e-3: 2.6}, {1e-4: 2.3, 5e-4: 2.1, 1e-3: 2.0}
    tried = [(3, rate, loss) for side in (shallow, deep) for rate, loss in side.items()]
    chosen = choose_rates([*tried, (30, 1e-4, 1.9), (30, 5e-4, 2.0)])
    assert chosen == {3: 5e-4, 30: 1e-4}, "1e-3 is best for the deep side alone"


def test_evenly_spaced_layers_are_compared_with_as_many_others():
    arms = [
        make_arm("spread, 2 layers", (1, 4), 2.0),
        make_arm("deep of 3", (3, 4), 2.4),
        make_arm("wise, 2 layers", (2, 4), 1.9),
        make_arm("against wise, 2 layers", (0, 1), 2.3),
        make_arm("shallow of 3", (0, 1, 2), 2.2),
    ]
    rows = render_spread(arms, "target").splitlines()[2:]
    told = [row.split(" | ") for row in rows]
    assert [(row[1], row[4]) for row in told] == [("wise, 2 layers", "+0.1000"), ("deep of 3", "-0.4000")]
    assert render_spread(arms[1:], "target") == ""


def test_early_ranks_are_compared_with_final_ones():
    early = [1.0, 3.0, 2.0, 4.0]
    arms = [make_arm(f"{number}", (number,), float(number), early=value) for number, value in enumerate(early)]
    assert f"| 2 | 10% | 4 | {spearmanr(early, range(4)).statistic:+.2f} |" in render_early(arms, "target")
