"""What a page says of a sweep: numbers worked out by hand, the front, and nothing claimed that rows do not carry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from layerplan.plan.estimate import measure_seeds
from layerplan.report.page import write_report
from layerplan.report.sweep_arms import Arm, SweepReading, compare, find_front, read_sweep
from layerplan.report.sweep_figures import draw_boundaries, draw_cost, draw_pareto
from layerplan.train.held_out_rows import RowLosses, save_losses
from layerplan.train.judge import VALIDATION
from layerplan.train.trial_record import TrialRecord

ROWS = 40
LABELS = np.full(ROWS, 10)
HARD = np.linspace(10.0, 50.0, ROWS)
"""How hard rows are, nats; far more than plans differ by."""


def make_losses(shift: float, noise: float, seed: int) -> RowLosses:
    return RowLosses(HARD + 10 * (shift + noise * np.random.default_rng(seed).normal(size=ROWS)), LABELS)


def leave_trial(
    sweep: Path, name: str, boundary: int, shift: float, *, seed: int = 0, step: int = 8, **values: object
) -> None:
    losses = {VALIDATION: make_losses(shift, 0.05, boundary), "english": make_losses(-shift / 2, 0.05, boundary + 50)}
    record = TrialRecord(
        name=name,
        boundary=boundary,
        step=step,
        max_steps=8,
        loss=losses[VALIDATION].mean,
        flops_share=0.5,
        flops=1e12,
        seed=seed,
        **values,  # type: ignore[arg-type]
    )
    (sweep / name).mkdir(parents=True)
    record.save(sweep / name)
    if step == 8:
        save_losses(sweep / name / "row_losses.json", losses)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    sweep = tmp_path / "sweep"
    (sweep / "base").mkdir(parents=True)
    save_losses(sweep / "base" / "row_losses.json", {VALIDATION: make_losses(0, 0, 0), "english": make_losses(0, 0, 0)})
    leave_trial(sweep, "boundary_01", 1, -0.10)
    leave_trial(sweep, "boundary_02", 2, -0.30)
    leave_trial(sweep, "boundary_02_seed1", 2, -0.30, seed=1)
    leave_trial(sweep, "boundary_03_shallow", 3, -0.29, freeze="shallow")
    leave_trial(sweep, "boundary_04", 4, 0.20, step=2)
    leave_trial(sweep, "boundary_01_seed1", 1, 0.90, seed=1, step=2)  # stopped, and no part of its arm's result
    return tmp_path


def test_a_difference_is_that_of_the_same_rows() -> None:
    """Rows differ by 4 nats a token; a shift of 0.3 is seen all the same."""
    losses = make_losses(-0.3, 0.05, 1)
    found = compare([losses], [make_losses(0, 0, 0)])
    assert found.interval is not None and found.interval[0] < found.value < found.interval[1] < -0.25
    assert found.value == pytest.approx(-0.3, abs=0.03)
    assert found.p_value == pytest.approx(ttest_rel(losses.nats, HARD).pvalue, rel=1e-6)
    same = compare([make_losses(0, 0.05, 1)], [make_losses(0, 0.05, 2)])
    assert same.p_value is not None and same.p_value > 0.05


def test_a_few_rows_have_no_interval() -> None:
    few = RowLosses(np.array([1.0, 3.0]), np.array([1, 3]))
    found = compare([few], [RowLosses(np.array([2.0, 4.0]), np.array([1, 3]))])
    assert (found.value, found.interval, found.p_value) == (pytest.approx(-0.5), None, None)


def make_sweep(shifts: Sequence[float], num_seeds: int, seed_spread: float, rng: np.random.Generator) -> SweepReading:
    """Arms that differ by `shifts`, their seeds by `seed_spread`, and every row of every one by 0.02 nats a token."""
    arms = []
    for place, shift in enumerate(shifts):
        losses = [
            RowLosses(HARD + 10 * (shift + seed_spread * rng.normal() + 0.02 * rng.normal(size=ROWS)), LABELS)
            for _ in range(num_seeds)
        ]
        record = TrialRecord(name=f"{place}", boundary=place, step=8, max_steps=8, loss=1.0, flops_share=0.5)
        arms.append(Arm((record,) * num_seeds, tuple({VALIDATION: each} for each in losses)))
    return SweepReading(tuple(arms), {VALIDATION: RowLosses(HARD, LABELS)}, (VALIDATION,))


@pytest.mark.parametrize(
    ("num_arms", "num_seeds", "seed_spread"), [(2, 2, 0.01), (6, 2, 0.01), (6, 3, 0.01), (6, 1, 0.0)]
)
def test_equal_arms_are_seldom_told_from_the_best(num_arms: int, num_seeds: int, seed_spread: float) -> None:
    """The best of them is chosen by the rows it is then compared on."""
    rng, draws = np.random.default_rng(num_arms + num_seeds), 150
    told = [
        len(make_sweep([0.0] * num_arms, num_seeds, seed_spread, rng).find_alike(VALIDATION)) < num_arms
        for _ in range(draws)
    ]
    assert np.mean(told) <= 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5


def test_an_arm_that_is_far_below_all_others_is_told_from_them() -> None:
    """Of however many, and with two seeds: their spread is known from all arms."""
    rng = np.random.default_rng(1)
    assert len(make_sweep([-1.0, *np.linspace(0, 0.1, 52)], 1, 0.0, rng).find_alike(VALIDATION)) == 1
    assert len(make_sweep([-0.1, *np.linspace(0, 0.1, 9)], 2, 0.005, rng).find_alike(VALIDATION)) == 1


def test_an_arm_of_one_seed_is_as_uncertain_as_a_seed() -> None:
    rng = np.random.default_rng(2)
    several, alone = make_sweep([0.0] * 8, 2, 0.05, rng), make_sweep([0.1], 1, 0.05, rng)
    both = SweepReading((*several.arms, *alone.arms), several.base, several.texts)
    spread = both.measure_seeds(VALIDATION)
    assert spread == measure_seeds(
        [np.stack([losses.nats / 10 for losses in arm.on(VALIDATION)]) for arm in several.arms], LABELS * 1.0
    )
    narrow, wide = (reading.compare_with_base(alone.arms[0], VALIDATION) for reading in (alone, both))
    assert narrow is not None and wide is not None and narrow.interval is not None and wide.interval is not None
    assert wide.interval[1] - wide.interval[0] > 4 * (narrow.interval[1] - narrow.interval[0])


def test_an_arm_whose_losses_are_not_finite_is_not_compared() -> None:
    reading = make_sweep([0.0, 0.1], 1, 0.0, np.random.default_rng(3))
    broken = RowLosses(np.where(np.arange(ROWS) == 3, np.nan, HARD), LABELS)
    arm = Arm(reading.arms[0].records, ({VALIDATION: broken},))
    reading = SweepReading((arm, *reading.arms), reading.base, reading.texts)
    assert reading.compare_with_base(arm, VALIDATION) is None
    assert len(reading.find_alike(VALIDATION)) == 1 and all(each is not arm for each in reading.find_alike(VALIDATION))


def test_the_front_is_what_no_other_beats_on_both() -> None:
    assert find_front([(0.0, 3.0), (1.0, 1.0), (2.0, 2.0), (3.0, 0.0), (1.0, 1.5)]) == [0, 1, 3]
    assert find_front([]) == []


def test_seeds_are_one_arm_and_what_was_stopped_comes_last(run: Path) -> None:
    reading = read_sweep(run / "sweep")
    assert reading is not None and reading.texts == (VALIDATION, "english")
    assert [arm.name for arm in reading.arms] == ["boundary_02", "boundary_03_shallow", "boundary_01", "boundary_04"]
    assert [len(arm.records) for arm in reading.arms] == [2, 1, 1, 1]
    assert [arm.is_whole for arm in reading.arms] == [True, True, True, False]
    alike = [arm.name for arm in reading.find_alike(VALIDATION)]
    assert "boundary_01" not in alike, "0.2 nats worse"
    assert set(alike) <= {"boundary_02", "boundary_03_shallow"} and len(alike) == 2, (
        "0.01 nats apart, with noise of 0.05"
    )
    assert reading.arms[-1].flops == 0.25e12


def test_the_page_says_it_and_has_its_figures(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    assert "<h2>The sweep</h2>" in page and "boundary_02 is lowest, -0." in page.replace("−", "-")
    assert (
        "1 of 2 others cannot be told from it (at 5 % over all pairs of arms; over rows and seeds)" in page
        and "Stopped before their last step: 1 of 4 arms" in page
    )
    for name in ("sweep_boundary_validation_loss", "sweep_boundary_english", "sweep_pareto_english", "sweep_cost"):
        assert (run / "figures" / f"{name}.png").stat().st_size > 0
    assert page.count("<svg") == 4


def test_evenly_spaced_layers_are_a_curve_of_their_own(run: Path) -> None:
    for boundary in (2, 3):
        leave_trial(run / "sweep", f"boundary_0{boundary}_spread", boundary, -0.4, freeze="spread")
    reading = read_sweep(run / "sweep")
    assert reading is not None
    for figure in (draw_boundaries(reading, VALIDATION), draw_pareto(reading, "english"), draw_cost(reading)):
        told = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert {"trains shallow", "trains deep", "trains as many as above, evenly spaced"} <= set(told)
    page = write_report(run).read_text(encoding="utf-8")
    assert "boundary_02_spread is lowest" in page or "boundary_03_spread is lowest" in page


def test_a_run_without_a_sweep_has_no_such_section(tmp_path: Path) -> None:
    assert "The sweep" not in write_report(tmp_path).read_text(encoding="utf-8")
