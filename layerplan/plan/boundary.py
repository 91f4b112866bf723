"""Boundaries: from a share of the layers, and from a measurement (boundary alignment score, Eq. 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from layerplan.errors import PlanError


def compute_boundary(split_ratio: float, num_layers: int) -> int:
    """Returns k = clamp(floor(split_ratio * L + 1/2), 1, L - 1): 28 layers give 9, 14, 19 for 1/3, 1/2, 2/3.

    Raises:
        PlanError: When the model has a single layer, which no boundary can split.
    """
    if num_layers < 2:
        raise PlanError(f"num_layers={num_layers}: a boundary needs at least 2 decoder layers")
    return min(max(math.floor(split_ratio * num_layers + 0.5), 1), num_layers - 1)


def check_boundary(boundary: int, num_layers: int, field: str = "plan.boundary") -> int:
    """Returns the boundary; raises `PlanError` unless it lies in 1..num_layers-1."""
    if not 1 <= boundary <= num_layers - 1:
        raise PlanError(f"{field}={boundary}: must lie in 1..{num_layers - 1} for a model of {num_layers} layers")
    return boundary


def normalize_min_max(values: Sequence[float]) -> list[float]:
    """Scales to [0, 1]; a constant profile becomes all zeros, since it prefers no layer."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def compute_alignment_scores(task_particle: Sequence[float], layer_sensitivity: Sequence[float]) -> list[float]:
    """Returns S(k) for k = 1..L-1 (Eq. 7): sensitive layers shallow, task particles deep.

    S(k) = [mean LS~ shallow - mean LS~ deep] + [mean TP~ deep - mean TP~ shallow], shallow = blocks 1..k, both
    profiles min-max normalised. LS(L) is dropped from profiles, so the deep mean of LS~ for k = L-1 has no layer and
    counts as 0.

    Args:
        task_particle: Ratio(l), L values.
        layer_sensitivity: LS(l), L-1 values (l = 1..L-1).

    Raises:
        PlanError: When the lengths do not fit or a value is not finite.
    """
    num_layers = len(task_particle)
    if num_layers < 2 or len(layer_sensitivity) != num_layers - 1:
        raise PlanError(
            f"profile: {num_layers} task-particle values need {num_layers - 1} sensitivities, got {len(layer_sensitivity)}"
        )
    if not all(math.isfinite(value) for value in (*task_particle, *layer_sensitivity)):
        raise PlanError("profile: task particle and layer sensitivity must be finite numbers")
    particle = normalize_min_max(task_particle)
    sensitivity = normalize_min_max(layer_sensitivity)
    return [
        _mean(sensitivity[:k]) - _mean(sensitivity[k:]) + _mean(particle[k:]) - _mean(particle[:k])
        for k in range(1, num_layers)
    ]


def find_best_boundary(scores: Sequence[float]) -> int:
    """Returns the boundary with the highest score; the smallest one on a tie."""
    return 1 + max(range(len(scores)), key=lambda index: (scores[index], -index))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
