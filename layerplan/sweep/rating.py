"""How much a measurement speaks for a trial: one number, by which a profile-guided search orders its trials."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from layerplan.plan.boundary import compute_alignment_scores
from layerplan.plan.boundary_choice import find_sensitivity, get_sensitivity
from layerplan.plan.layer_measurement import LayerMeasurement
from layerplan.plan.layer_profile import LayerProfile
from layerplan.sweep.space import Point


def rate_by_profile(profile: LayerProfile) -> Callable[[Point], float]:
    """The standardised alignment score S(k) sqrt(k (L - k)) / L (Eq. 7) of freezing the deep side, and its negative for the
    shallow side; what has no score comes last: the outermost boundary, and evenly spaced layers.
    """
    num_layers = profile.model.num_layers
    scores = compute_alignment_scores(profile.task_particle, get_sensitivity(profile, find_sensitivity(profile)))

    def rate(point: Point) -> float:
        if point.boundary > len(scores) or point.freeze == "spread":
            return -np.inf
        rating = float(scores[point.boundary - 1]) * _weigh(point.boundary, num_layers)
        return rating if point.freeze == "deep" else -rating

    return rate


def rate_by_measurement(measurement: LayerMeasurement) -> Callable[[Point], float]:
    """The standardised difference of what is measured of the layers that train and of those that freeze."""
    values = np.asarray(measurement.turned_values, dtype=np.float64)

    def rate(point: Point) -> float:
        trains = np.zeros(len(values), dtype=bool)
        trains[list(point.list_trained(len(values)))] = True
        return float(values[trains].mean() - values[~trains].mean()) * _weigh(point.boundary, len(values))

    return rate


def _weigh(boundary: int, num_layers: int) -> float:
    return float(np.sqrt(boundary * (num_layers - boundary)) / num_layers)
