"""Boundaries and alignment scores, with numbers computed by hand and by loops over the formulas."""

from __future__ import annotations

import naive_boundary
import numpy as np
import pytest

from layerplan.errors import PlanError
from layerplan.plan.boundary import (
    check_boundary,
    compute_alignment_scores,
    compute_boundary,
    find_best_boundary,
    list_candidates,
    rate_boundaries,
)


def test_28_layers_give_9_14_19():
    assert [compute_boundary(ratio, 28) for ratio in (1 / 3, 1 / 2, 2 / 3)] == [9, 14, 19]


@pytest.mark.parametrize(("ratio", "num_layers", "expected"), [(0.01, 8, 1), (0.99, 8, 7), (0.5, 7, 4), (0.5, 2, 1)])
def test_a_ratio_is_rounded_half_up_and_clamped(ratio: float, num_layers: int, expected: int):
    assert compute_boundary(ratio, num_layers) == expected


def test_one_layer_cannot_be_split():
    with pytest.raises(PlanError, match="num_layers=1"):
        compute_boundary(0.5, 1)


@pytest.mark.parametrize("boundary", [0, 8, -1])
def test_a_boundary_outside_the_model_is_refused(boundary: int):
    with pytest.raises(PlanError, match=rf"plan.boundary={boundary}: must lie in 1..7"):
        check_boundary(boundary, 8)


def test_alignment_score_by_hand_where_both_sides_have_both_profiles():
    # TP~ = [0, 0, 1/2, 1], LS~ = [1, 1/2, 0] (layers 1..3); at k = 3 the deep side has no LS, so S ends at 2
    scores = compute_alignment_scores([1, 1, 2, 3], [4, 2, 0])
    assert scores.tolist() == pytest.approx([(1 - 1 / 4) + (1 / 2 - 0), (3 / 4 - 0) + (3 / 4 - 0)])
    assert find_best_boundary(scores, 4, "paper", 1) == 2
    # a profile whose last layer alone is a peak: with the empty side as 0, S(3) = 1/3 + 1 would have won
    assert find_best_boundary(compute_alignment_scores([0, 0, 0, 1], [0, 0, 1]), 4, "paper", 1) == 1


def test_the_standardised_form_by_hand():
    scores = np.array([0.5, 0.6, 0.4])
    # sqrt(k (5 - k)) / 5 = 0.4, sqrt(6)/5, sqrt(6)/5
    rated = rate_boundaries(scores, 5, "change_point", 1)
    assert rated.tolist() == pytest.approx([0.2, 0.6 * 6**0.5 / 5, 0.4 * 6**0.5 / 5])
    assert rate_boundaries(scores, 5, "change_point", 2).tolist() == pytest.approx(rated[1:].tolist())
    assert rate_boundaries(scores, 5, "paper", 2).tolist() == scores.tolist()


@pytest.mark.parametrize(
    ("num_layers", "rule", "min_side", "expected"),
    [
        (28, "change_point", 2, range(2, 27)),
        (28, "change_point", 1, range(1, 27)),
        (28, "paper", 5, range(1, 27)),
        (4, "change_point", 2, range(2, 3)),
        (3, "change_point", 2, range(2, 2)),
        (2, "paper", 1, range(1, 1)),
    ],
)
def test_a_boundary_needs_layers_and_both_profiles_on_either_side(num_layers, rule, min_side, expected):
    assert list_candidates(num_layers, rule, min_side) == expected


def test_scores_and_choices_are_those_of_loops_over_the_formulas():
    rng = np.random.default_rng(0)
    for num_layers in (3, 5, 8, 28):
        particle, sensitivity = rng.exponential(size=(20, num_layers)), rng.exponential(size=(20, num_layers - 1))
        scores = compute_alignment_scores(particle, sensitivity)
        assert scores.shape == (20, num_layers - 2)
        for rule in ("paper", "change_point"):
            found = find_best_boundary(scores, num_layers, rule, 1)
            for row in range(20):
                lists = particle[row].tolist(), sensitivity[row].tolist()
                rated = naive_boundary.rate(*lists, rule, 1)
                assert rate_boundaries(scores[row], num_layers, rule, 1) == pytest.approx(list(rated.values()))
                assert found[row] == naive_boundary.best(*lists, rule, 1)


def test_a_constant_profile_prefers_no_boundary_and_a_tie_takes_the_smallest():
    scores = compute_alignment_scores([2.0] * 4, [1.0] * 3)
    assert scores.tolist() == [0, 0]
    assert find_best_boundary(scores, 4, "paper", 1) == 1


@pytest.mark.parametrize("sensitivity", [[1.0, 2.0], [1.0, 2.0, float("nan")]])
def test_profiles_of_wrong_length_or_not_finite_are_refused(sensitivity: list[float]):
    with pytest.raises(PlanError, match="profile"):
        compute_alignment_scores([1.0, 2.0, 3.0, 4.0], sensitivity)
