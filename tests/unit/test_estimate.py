"""Means over units and seeds against SciPy, textbook formulas and a naive bootstrap, and how often they are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from layerplan.plan.estimate import PooledEstimate, estimate_pooled, measure_seeds

DRAWS = 400
MOST = 0.05 + 3 * math.sqrt(0.05 * 0.95 / DRAWS)
"""Share of draws that a test at 5 % rejects at most, three standard errors above it."""


def is_zero_outside(estimate: PooledEstimate) -> bool:
    low, high = estimate.interval()
    return low > 0 or high < 0


@pytest.mark.parametrize("shift", [0.0, 0.3, 3.0, 30.0])
def test_one_seed_and_equal_units_are_students_paired_test(shift: float) -> None:
    values = np.random.default_rng(1).normal(shift, 1, 40)
    found, theirs = estimate_pooled(values[None]), ttest_1samp(values, 0)
    assert found.p_different() == pytest.approx(theirs.pvalue, rel=1e-6)
    assert found.interval() == pytest.approx(tuple(theirs.confidence_interval()))


def test_weighted_units_have_an_unbiased_variance_and_satterthwaites_degrees() -> None:
    """Against the quadratic form written out: e' D e of residuals, its trace, and the trace of its square."""
    rng = np.random.default_rng(2)
    weights, values = rng.lognormal(0, 1.2, 15), rng.normal(size=15)
    share = weights / weights.sum()
    residual_of = np.eye(15) - np.outer(np.ones(15), share)
    scale = np.diag(share**2 / np.diag(residual_of @ residual_of.T))
    form = residual_of.T @ scale @ residual_of
    ((variance, degrees),) = estimate_pooled(values[None], weights_N=weights).parts
    assert variance == pytest.approx(values @ form @ values)
    assert np.trace(form) == pytest.approx(share @ share), "the variance of a weighted mean of unit variances"
    assert degrees == pytest.approx(np.trace(form) ** 2 / np.trace(form @ form))
    ((_, equal),) = estimate_pooled(values[None], weights_N=np.full(15, 7.0)).parts
    assert equal == pytest.approx(14)


def test_strata_have_the_textbooks_variance() -> None:
    """Sum of (n / N)^2 s^2 / n over strata (Cochran 1977, equation 5.6 with proportional shares)."""
    rng = np.random.default_rng(3)
    sizes = (2, 5, 30)
    parts = [rng.normal(place, 1 + place, size) for place, size in enumerate(sizes)]
    strata = [str(place) for place, size in enumerate(sizes) for _ in range(size)]
    ((variance, degrees),) = estimate_pooled(np.concatenate(parts)[None], strata=strata).parts
    assert variance == pytest.approx(sum((len(part) / 37) ** 2 * part.var(ddof=1) / len(part) for part in parts))
    terms = [size / 37**2 for size in sizes]
    assert degrees == pytest.approx(sum(terms) ** 2 / sum(term**2 / (n - 1) for term, n in zip(terms, sizes)))


def test_strata_of_one_unit_are_put_together() -> None:
    values = np.array([[1.0, 0.0, 0.0, 1.0, 5.0, 7.0]])
    ((variance, _),) = estimate_pooled(values, strata=["a", "b", "c", "d", "e", "e"]).parts
    assert variance == pytest.approx((4 / 6) ** 2 * (1 / 3) / 4 + (2 / 6) ** 2 * 2 / 2)
    ((joined, _),) = estimate_pooled(values[:, 3:], strata=["d", "e", "e"]).parts
    assert joined == pytest.approx(values[0, 3:].var(ddof=1) / 3)


def test_seeds_and_units_are_crossed_as_in_a_naive_bootstrap() -> None:
    """A loop that draws seeds, then units inside each stratum, one at a time, and scales seeds' deviations."""
    rng = np.random.default_rng(5)
    values = (rng.random((3, 60)) < np.array([[0.2], [0.5], [0.8]])).astype(float)
    strata = ["law"] * 20 + ["art"] * 40
    slow = []
    for _ in range(4000):
        seeds = rng.integers(0, 3, 3)
        drawn = np.concatenate([rng.integers(0, 20, 20), 20 + rng.integers(0, 40, 40)])
        alike = values[:, drawn].mean()
        slow.append(alike + (3 / 2) ** 0.5 * (values[np.ix_(seeds, drawn)].mean() - alike))
    found = estimate_pooled(values, strata=strata)
    assert found.mean == pytest.approx(np.mean(slow), abs=0.01)
    assert found.standard_error == pytest.approx(np.std(slow), rel=0.06)
    one_seed = estimate_pooled(values[:1], strata=strata)
    assert found.standard_error > 1.5 * one_seed.standard_error, "the variation between seeds must widen the interval"


def test_seeds_and_units_have_the_variances_of_a_two_way_layout() -> None:
    """(MS seeds + MS units) / (S N); MS rest / (S N), which both hold, is left in both."""
    values = np.random.default_rng(6).normal(size=(4, 30)) + np.random.default_rng(7).normal(size=30)
    seeds, units = values.mean(1) - values.mean(), values.mean(0) - values.mean()
    squares = 30 * (seeds**2).sum() / 3 + 4 * (units**2).sum() / 29
    assert estimate_pooled(values).standard_error ** 2 == pytest.approx(squares / (4 * 30))


@pytest.mark.parametrize("num_seeds", [2, 3, 4, 5, 6, 8, 12])
def test_seeds_without_a_true_difference_are_seldom_told_apart(num_seeds: int) -> None:
    """SciPy's quantile of a tail of 1e-300 is minus infinity for 3 and 5 to 12 degrees; every such test used to reject."""
    rng = np.random.default_rng(num_seeds)
    rejected = 0
    for _ in range(DRAWS):
        ours, theirs = (rng.normal(0, 0.5, (num_seeds, 1)) + rng.normal(size=(num_seeds, 30)) for _ in range(2))
        rejected += is_zero_outside(estimate_pooled(ours, minus_SN=theirs))
    assert rejected / DRAWS <= MOST
    assert estimate_pooled(ours, minus_SN=theirs).p_different() > 1e-6


@pytest.mark.parametrize("per_stratum", [1, 2, 3])
def test_intervals_cover_with_few_units_in_each_stratum(per_stratum: int) -> None:
    """40 subjects; right answers of two models that differ on three in twenty questions, neither of them better."""
    rng = np.random.default_rng(per_stratum)
    strata = [str(place) for place in range(40) for _ in range(per_stratum)]
    missed = 0
    for _ in range(DRAWS):
        first = rng.random(len(strata)) < 0.5
        second = np.where(rng.random(len(strata)) < 0.7, first, rng.random(len(strata)) < 0.5)
        missed += is_zero_outside(estimate_pooled((first * 1.0 - second)[None], strata=strata))
    assert missed / DRAWS <= MOST


@pytest.mark.parametrize(("num_units", "spread"), [(10, 0.0), (15, 0.0), (10, 1.2), (30, 1.2), (100, 1.2)])
def test_weighted_units_without_a_true_difference_are_seldom_told_apart(num_units: int, spread: float) -> None:
    rng = np.random.default_rng(num_units)
    rejected = 0
    for _ in range(DRAWS):
        weights = rng.lognormal(7, spread, num_units)
        rejected += is_zero_outside(estimate_pooled(rng.normal(size=(1, num_units)), weights_N=weights))
    assert rejected / DRAWS <= MOST


def test_the_spread_of_seeds_may_come_from_more_conditions() -> None:
    rng = np.random.default_rng(8)
    conditions = [rng.normal(0, 0.5, (2, 1)) + rng.normal(0, 0.1, (2, 50)) for _ in range(200)]
    spread = measure_seeds([*conditions, rng.normal(size=(1, 50))])
    assert spread is not None and spread.degrees == 200
    assert spread.variance == pytest.approx(0.25, rel=0.3)
    one = estimate_pooled(rng.normal(0, 0.1, (1, 50)), spread=spread)
    assert one.parts[0] == (spread.variance, 200), "an arm of one seed is as uncertain as a seed"
    wild = np.array([[1.0], [9.0]]) + rng.normal(0, 0.1, (2, 50))
    own, shared = measure_seeds([wild]), estimate_pooled(wild, spread=spread)
    assert own is not None and shared.parts[0] == (own.variance / 2, 200), "the wider of both"
    assert measure_seeds([wild[:1]]) is None


def test_units_that_do_not_differ_are_no_better_than_a_sign_test() -> None:
    assert estimate_pooled(np.full((1, 8), 0.1)).p_different() == pytest.approx(2 / 2**8)
    assert estimate_pooled(np.full((2, 8), 0.1)).p_different() == pytest.approx(2 / 2**8)
    assert estimate_pooled(np.zeros((2, 8))).p_different() == 1.0
    first_only = np.zeros((2, 8))
    first_only[:, 0] = 1.0
    found = estimate_pooled(first_only, strata=[str(place) for place in range(8)])
    assert found.p_different() > 0.3, "one question of eight, each of a subject of its own"


def test_of_one_unit_nothing_is_known() -> None:
    found = estimate_pooled(np.array([[3.0]]))
    assert found.interval() == (-math.inf, math.inf) and found.p_different() == 1.0


def test_a_pooled_estimate_has_students_quantiles_at_its_ends() -> None:
    only_units = PooledEstimate(0.3, ((0.0, 1), (0.01, 10_000)))
    assert only_units.p_different(0.1) == pytest.approx(0.0455, abs=1e-3)  # two standard errors
    only_seeds = PooledEstimate(0.3, ((0.01, 1), (0.0, 10_000)))
    assert only_seeds.p_different(0.1) == pytest.approx(2 * student.sf(2, 1), rel=1e-6)
    assert only_seeds.p_at_most(0.3) == pytest.approx(0.5)
    low, high = only_seeds.interval()
    assert (high - low) / 2 == pytest.approx(12.706 * 0.1, rel=1e-3)
