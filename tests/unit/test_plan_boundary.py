"""Boundaries and alignment scores, with numbers computed by hand."""

from __future__ import annotations

import pytest

from layerplan.errors import PlanError
from layerplan.plan.boundary import check_boundary, compute_alignment_scores, compute_boundary, find_best_boundary


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


def test_alignment_score_by_hand():
    # TP~ = [0, 0, 1/2, 1], LS~ = [1, 1/2, 0] (layers 1..3)
    scores = compute_alignment_scores([1, 1, 2, 3], [4, 2, 0])
    assert scores[0] == pytest.approx((1 - 1 / 4) + (1 / 2 - 0))
    assert scores[1] == pytest.approx((3 / 4 - 0) + (3 / 4 - 0))
    assert scores[2] == pytest.approx((1 / 2 - 0) + (1 - 1 / 6))
    assert find_best_boundary(scores) == 2


def test_a_constant_profile_prefers_no_boundary_and_a_tie_takes_the_smallest():
    scores = compute_alignment_scores([2.0] * 4, [1.0] * 3)
    assert scores == [0, 0, 0]
    assert find_best_boundary(scores) == 1


@pytest.mark.parametrize("sensitivity", [[1.0, 2.0], [1.0, 2.0, float("nan")]])
def test_profiles_of_wrong_length_or_not_finite_are_refused(sensitivity: list[float]):
    with pytest.raises(PlanError, match="profile"):
        compute_alignment_scores([1.0, 2.0, 3.0, 4.0], sensitivity)
