"""Layer profiles with a measurement made up for a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from layerplan.plan.boundary import compute_alignment_scores
from layerplan.plan.layer_profile import LayerProfile, ModelIdentity


def make_profile(
    model: ModelIdentity, task_particle: Sequence[float], layer_sensitivity: Sequence[float], **fields: Any
) -> LayerProfile:
    """A sealed profile of L task particles and L - 1 sensitivities; everything else is empty, zero or as given."""
    num_layers = model.num_layers
    zeros = [0.0] * num_layers
    scores = compute_alignment_scores(task_particle, layer_sensitivity).tolist()
    values: dict[str, Any] = {
        "model": model,
        "options": {},
        "probe_set_sha256": "0",
        "groups": ["g"],
        "num_probes": 1,
        "num_right": 1,
        "answered_share": {"g": 1.0},
        "task_particle": list(task_particle),
        "task_particle_rows": [list(task_particle)],
        "task_particle_median": zeros,
        "task_particle_log": zeros,
        "task_particle_interval": (0, 0),
        "task_particle_argmax": 0,
        "js": [*zeros, 0.0],
        "layer_sensitivity": list(layer_sensitivity),
        "layer_sensitivity_rows": [list(layer_sensitivity)],
        "absolute_sensitivity": zeros,
        "alignment_score": scores,
        "best_boundary": 1 + scores.index(max(scores)) if scores else None,
    }
    return LayerProfile(**{**values, **fields}).sealed()


def make_step_profile(model: ModelIdentity, boundary: int, noise: float = 0.1, **fields: Any) -> LayerProfile:
    """Task particles of 1 from layer `boundary` on, sensitivities of 1 below it, else 0, with a little noise."""
    rng = np.random.default_rng(boundary)
    is_deep = np.arange(model.num_layers) >= boundary
    particle = is_deep + noise * rng.random(model.num_layers)
    sensitivity = ~is_deep[:-1] + noise * rng.random(model.num_layers - 1)
    return make_profile(model, particle.tolist(), sensitivity.tolist(), **fields)
