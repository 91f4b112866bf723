"""What the tracer measured, as numbers per layer beside those of its rivals: LayerTracer's S and SALF's gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from layerplan.plan.boundary import Array, normalize_min_max
from layerplan.plan.boundary_choice import find_sensitivity, get_sensitivity
from layerplan.plan.layer_measurement import LayerMeasurement, MeasuringCost
from layerplan.plan.layer_profile import LayerProfile

ALIGNMENT, SEMANTIC_GAIN = "alignment", "semantic_gain"


def convert_alignment(profile: LayerProfile, cost: MeasuringCost) -> LayerMeasurement:
    """The number whose steps S(k) compares: normalised sensitivity less normalised task particle; high trains shallow.

    The last layer has no sensitivity (it is 1 by construction), which counts as the least here; S itself leaves it out.
    """
    rows = zip(profile.task_particle_rows, profile.layer_sensitivity_rows)
    return LayerMeasurement(
        name=ALIGNMENT,
        values=_subtract(profile.task_particle, get_sensitivity(profile, find_sensitivity(profile))).tolist(),
        repeats=[_subtract(particle, sensitivity).tolist() for particle, sensitivity in rows],
        repeated_over="groups of probes",
        repeat_names=profile.groups,
        options={"probe_set_sha256": profile.probe_set_sha256, "profile_sha256": profile.sha256},
        cost=cost,
    )


def convert_semantic(
    profile: LayerProfile, records: Sequence[Mapping[str, Any]], cost: MeasuringCost, kind: str = "cosine"
) -> LayerMeasurement:
    """SALF's gain d(l-1) - d(l) of the deviation from the right answer; layers before its largest freeze.

    Args:
        profile: The measurement.
        records: Its probes, as `layer_probes.parquet` holds them: the repeats.
        cost: Of the tracing.
        kind: Of the deviation.
    """
    gains = [-np.diff(np.asarray(record[f"deviation_{kind}"], dtype=np.float64)) for record in records]
    return LayerMeasurement(
        name=SEMANTIC_GAIN,
        values=np.mean(gains, axis=0).tolist(),
        repeats=[gain.tolist() for gain in gains],
        repeated_over="probes",
        options={"probe_set_sha256": profile.probe_set_sha256, "profile_sha256": profile.sha256, "deviation": kind},
        cost=cost,
    )


def price_tracing(
    profile: LayerProfile, forward_flops: float, records: Sequence[Mapping[str, Any]], seconds: float | None
) -> MeasuringCost:
    """Cost of a tracing, at most: an intact pass, and for each layer a masked copy that crosses the layers above it."""
    tokens = sum(int(record["num_tokens"]) for record in records)
    copies = profile.model.num_layers / 2
    return MeasuringCost(seconds=seconds, flops=forward_flops * tokens * (1 + copies), tokens=tokens)


def _subtract(particle: Sequence[float], sensitivity: Sequence[float]) -> Array:
    return np.append(normalize_min_max(sensitivity), 0.0) - normalize_min_max(particle)
