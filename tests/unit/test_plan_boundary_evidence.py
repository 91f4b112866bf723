"""What noise is called, what planted steps are called, and where they are found: simulations with fixed seeds."""

from __future__ import annotations

import random
from functools import cache

import naive_boundary
import numpy as np
import pytest

from layerplan.plan.boundary import compute_alignment_scores, find_best_boundary
from layerplan.plan.holm import correct_holm
from layerplan.plan.permutation import compare_with_other_orders, find_boundary_range

RULE, MIN_SIDE, NUM_PROFILES = "change_point", 2, 2000


def draw_correlated(rng: np.random.Generator, shape: tuple[int, int], correlation: float) -> np.ndarray:
    """Normal noise whose neighbours along the last axis have the given correlation."""
    steps = rng.normal(size=shape)
    values = steps.copy()
    for layer in range(1, shape[1]):
        values[:, layer] = correlation * values[:, layer - 1] + (1 - correlation**2) ** 0.5 * steps[:, layer]
    return values


@cache
def draw_noise(num_layers: int, count: int, correlation: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([num_layers, count])
    shapes = (count, num_layers), (count, num_layers - 1)
    if correlation:
        return tuple(draw_correlated(rng, shape, correlation) for shape in shapes)
    return tuple(rng.exponential(size=shape) for shape in shapes)


def plant_step(boundary: int, height: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise of standard deviation 1 in 28 layers with task particles deep and sensitive layers shallow."""
    rng = np.random.default_rng([boundary, count])
    particle, sensitivity = rng.normal(size=(count, 28)), rng.normal(size=(count, 27))
    particle[:, boundary:] += height
    sensitivity[:, :boundary] += height
    return particle, sensitivity


def find_boundaries(particle: np.ndarray, sensitivity: np.ndarray) -> np.ndarray:
    return find_best_boundary(compute_alignment_scores(particle, sensitivity), particle.shape[1], RULE, MIN_SIDE)


def measure_p(particle: np.ndarray, sensitivity: np.ndarray) -> np.ndarray:
    return np.array([compare_with_other_orders(*rows, RULE, MIN_SIDE).p_value for rows in zip(particle, sensitivity)])


@pytest.mark.parametrize("rule", ["paper", "change_point"])
@pytest.mark.parametrize(("num_layers", "step"), [(8, 0.0), (8, 2.0), (18, 1.0)])
def test_both_p_are_those_of_loops_over_the_definition(rule: str, num_layers: int, step: float) -> None:
    rng = np.random.default_rng(num_layers)
    particle, sensitivity = rng.exponential(size=num_layers), rng.exponential(size=num_layers - 1)
    particle[num_layers // 2 :] += step
    sensitivity[: num_layers // 2] += step
    found = compare_with_other_orders(particle, sensitivity, rule, MIN_SIDE)
    lists = particle.tolist(), sensitivity.tolist()
    assert found.shift_p == naive_boundary.shift_p(*lists, rule, MIN_SIDE)
    # other random orders than ours: two shares of 999 and 400 draws differ by less than 4 standard errors
    naive = naive_boundary.block_p(*lists, rule, MIN_SIDE, random.Random(1), 400)
    error = (max(naive, 0.01) * (1 - min(naive, 0.99)) * (1 / 400 + 1 / 999)) ** 0.5
    assert abs(found.block_p - naive) < 4 * error
    assert found.p_value == max(found.shift_p, found.block_p)


@pytest.mark.parametrize("num_layers", [8, 28, 64])
def test_independent_noise_is_called_evidence_in_at_most_6_percent(num_layers: int) -> None:
    p_values = measure_p(*draw_noise(num_layers, NUM_PROFILES))
    assert (p_values < 0.05).mean() <= 0.06


@pytest.mark.parametrize(("num_layers", "count"), [(8, 500), (28, NUM_PROFILES), (64, 300)])
def test_noise_that_resembles_its_neighbours_is_called_evidence_in_at_most_8_percent(
    num_layers: int, count: int
) -> None:
    particle, sensitivity = draw_noise(num_layers, count, 0.5)
    assert np.corrcoef(particle[:, 1:].ravel(), particle[:, :-1].ravel())[0, 1] == pytest.approx(0.5, abs=0.05)
    assert (measure_p(particle, sensitivity) < 0.05).mean() <= 0.08


def test_no_boundary_is_a_favourite_of_noise() -> None:
    particle, sensitivity = draw_noise(28, NUM_PROFILES)
    share = np.bincount(find_boundaries(particle, sensitivity), minlength=28) / NUM_PROFILES
    assert share.max() <= 5 / 27
    # the raw form does have favourites: the outermost boundaries at either end
    raw = find_best_boundary(compute_alignment_scores(particle, sensitivity), 28, "paper", 1)
    assert np.isin(raw, [1, 2, 25, 26]).mean() > 0.5


@pytest.mark.parametrize("boundary", [7, 14, 21])
def test_a_planted_step_is_found_where_it_is_and_called_evidence(boundary: int) -> None:
    particle, sensitivity = plant_step(boundary, 1.5, 500)
    is_near = abs(find_boundaries(particle, sensitivity) - boundary) <= 2
    assert is_near.mean() >= 0.85
    assert (is_near & (measure_p(particle, sensitivity) < 0.05)).mean() >= 0.75


@pytest.mark.parametrize("boundary", [7, 14, 21])
def test_the_range_holds_a_planted_step_and_is_narrow_only_for_a_clear_one(boundary: int) -> None:
    widths = {}
    for height in (1.5, 3.0):
        ranges = np.array(
            [find_boundary_range(*rows, RULE, MIN_SIDE) for rows in zip(*plant_step(boundary, height, 200))]
        )
        assert ((ranges[:, 0] <= boundary) & (boundary <= ranges[:, 1])).mean() >= 0.92
        widths[height] = (ranges[:, 1] - ranges[:, 0] + 1).mean()
    assert widths[3.0] < 4 < widths[1.5]


def test_a_steady_trend_is_evidence_of_a_difference_and_has_a_wide_range() -> None:
    trend = np.arange(28.0)
    assert compare_with_other_orders(trend, -trend[:-1], RULE, MIN_SIDE).p_value < 0.01
    low, high = find_boundary_range(trend, -trend[:-1], RULE, MIN_SIDE)
    assert low <= 14 <= high and high - low + 1 >= 10
    step = (trend >= 14).astype(float)
    assert find_boundary_range(step, 1 - step[:-1], RULE, MIN_SIDE) == (14, 14)


def test_constant_profiles_and_too_few_layers_are_no_evidence() -> None:
    assert compare_with_other_orders([1.0] * 28, [1.0] * 27, RULE, MIN_SIDE).p_value == 1.0
    assert compare_with_other_orders([1.0, 2.0, 3.0], [2.0, 1.0], RULE, MIN_SIDE).p_value == 1.0
    assert find_boundary_range([1.0, 2.0, 3.0], [2.0, 1.0], RULE, MIN_SIDE) is None
    # four layers have 12 pairs of shifts and 2 orders of 2 blocks: nothing about them can be rare
    assert compare_with_other_orders([0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0], RULE, MIN_SIDE).p_value > 0.05


def test_p_is_a_function_of_the_profile_alone() -> None:
    rows = [values[0] for values in draw_noise(28, NUM_PROFILES)]
    first, again = (compare_with_other_orders(*rows, RULE, MIN_SIDE) for _ in range(2))
    assert first == again
    scaled = compare_with_other_orders(rows[0] * 7 + 3, rows[1] / 9, RULE, MIN_SIDE)
    assert scaled.p_value == first.p_value, "normalised profiles have no unit"


def test_holm_counts_every_try() -> None:
    # Holm 1979: the smallest of three times 3, the next times 2, never below an earlier one
    assert correct_holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
