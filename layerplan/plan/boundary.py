"""Boundaries: from a share of the layers, and from a measurement (boundary alignment score, Eq. 7).

A raw argmax of S favours the ends, where the mean of one side is that of a handful of layers and scatters most. The
standardised form S(k) sqrt(k (L - k)) / L is the difference of means that tests for a change point use: on noise no
boundary wins much more often than another.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerplan.config.plan import BoundaryRule
from layerplan.errors import PlanError

Array = NDArray[np.float64]
RULES: tuple[BoundaryRule, ...] = ("change_point", "paper")
PAPER_RATIOS = {"1/3": 1 / 3, "1/2": 1 / 2, "2/3": 2 / 3}
"""Shares of shallow layers that the paper compares."""
TIE = 1e-12
"""Scores nearer than this are equal: sums in another order differ by rounding."""


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


def normalize_min_max(values: ArrayLike) -> Array:
    """Scales the last axis to [0, 1]; a constant profile becomes all zeros, since it prefers no layer."""
    array = np.asarray(values, dtype=np.float64)
    low, high = array.min(-1, keepdims=True), array.max(-1, keepdims=True)
    spread = high - low
    return np.where(spread > 0, (array - low) / np.where(spread > 0, spread, 1.0), 0.0)


def compute_alignment_scores(task_particle: ArrayLike, layer_sensitivity: ArrayLike) -> Array:
    """Returns S(k) for k = 1..L-2 (Eq. 7): sensitive layers shallow, task particles deep.

    S(k) = [mean LS~ shallow - mean LS~ deep] + [mean TP~ deep - mean TP~ shallow], shallow = blocks 1..k, both
    profiles min-max normalised. LS(L) is dropped from profiles, so at k = L-1 the deep side has no LS and S does not
    exist; a model of two layers has no S at all.

    Args:
        task_particle: Ratio(l), (..., L).
        layer_sensitivity: LS(l), l = 1..L-1, (..., L - 1).

    Returns:
        (..., L - 2); entry i belongs to boundary i + 1.

    Raises:
        PlanError: When the lengths do not fit or a value is not finite.
    """
    particle, sensitivity = check_profiles(task_particle, layer_sensitivity)
    num_boundaries = particle.shape[-1] - 2
    return step_down(normalize_min_max(sensitivity), num_boundaries) - step_down(
        normalize_min_max(particle), num_boundaries
    )


def check_profiles(task_particle: ArrayLike, layer_sensitivity: ArrayLike) -> tuple[Array, Array]:
    """Both profiles as arrays; raises `PlanError` when their lengths do not fit or a value is not finite."""
    particle = np.asarray(task_particle, dtype=np.float64)
    sensitivity = np.asarray(layer_sensitivity, dtype=np.float64)
    num_layers = particle.shape[-1]
    if num_layers < 2 or sensitivity.shape[-1] != num_layers - 1:
        raise PlanError(
            f"profile: {num_layers} task-particle values need {num_layers - 1} sensitivities, got {sensitivity.shape[-1]}"
        )
    if not (np.isfinite(particle).all() and np.isfinite(sensitivity).all()):
        raise PlanError("profile: task particle and layer sensitivity must be finite numbers")
    return particle, sensitivity


def step_down(values: Array, num_boundaries: int, weights: Array | None = None) -> Array:
    """Mean of the first k values less the mean of the rest, k = 1..num_boundaries: (..., n) to (..., num_boundaries).

    Args:
        values: (..., n), n > num_boundaries.
        num_boundaries: Largest k.
        weights: Positive weights of the values, equal when left out.
    """
    weights = np.ones(values.shape[-1]) if weights is None else weights
    sums, sizes = np.cumsum(weights * values, -1), np.cumsum(weights, -1)
    shallow, size = sums[..., :num_boundaries], sizes[..., :num_boundaries]
    return shallow / size - (sums[..., -1:] - shallow) / (sizes[..., -1:] - size)


def weigh_boundaries(num_layers: int, rule: BoundaryRule) -> Array:
    """Factor of S(k) for k = 1..L-2: sqrt(k (L - k)) / L under `change_point`, 1 under `paper`."""
    k = np.arange(1, num_layers - 1)
    return np.sqrt(k * (num_layers - k)) / num_layers if rule == "change_point" else np.ones(len(k))


def list_candidates(num_layers: int, rule: BoundaryRule, min_side: int) -> range:
    """Boundaries the rule may choose: those with S, under `change_point` with `min_side` layers on either side."""
    least = min_side if rule == "change_point" else 1
    return range(least, min(num_layers - 2, num_layers - least) + 1)


def rate_boundaries(scores: Array, num_layers: int, rule: BoundaryRule, min_side: int) -> Array:
    """What the rule compares: its form of S(k) at the candidates, (..., L - 2) to (..., number of candidates)."""
    candidates = list_candidates(num_layers, rule, min_side)
    return (scores * weigh_boundaries(num_layers, rule))[..., candidates.start - 1 : max(candidates.stop - 1, 0)]


def find_best_boundary(scores: Array, num_layers: int, rule: BoundaryRule, min_side: int) -> NDArray[Any]:
    """Candidate with the highest rating, the smallest on a tie, for each profile: (..., L - 2) to (...).

    There must be a candidate.
    """
    rated = rate_boundaries(scores, num_layers, rule, min_side)
    is_best = rated >= rated.max(-1, keepdims=True) - TIE
    return np.asarray(is_best.argmax(-1) + list_candidates(num_layers, rule, min_side).start)
