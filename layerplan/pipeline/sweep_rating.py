"""Where a profile-guided search has its measurement from: the run's folder, or a measurement taken now."""

from __future__ import annotations

from collections.abc import Callable

from layerplan.config.measure import MEASUREMENTS
from layerplan.config.search import ProfileSearchConfig, SearchConfig
from layerplan.models.ref import ModelRef
from layerplan.pipeline.measure_layers import measure
from layerplan.pipeline.stages import RunContext, say, tracked
from layerplan.plan.layer_measurement import LayerMeasurements
from layerplan.plan.layer_profile import LayerProfile
from layerplan.run_folder import RunFolder
from layerplan.storage.mirror import fetch_file
from layerplan.sweep.rating import rate_by_measurement, rate_by_profile
from layerplan.sweep.space import Point
from layerplan.tracer.pool import trace_model

Rate = Callable[[Point], float]


def find_rating(folder: RunFolder, search: ProfileSearchConfig) -> Rate | None:
    """How much the run's own measurement speaks for a trial; None when it was not taken yet.

    Raises:
        PlanError: When the file cannot be read.
    """
    if search.by == "layer_profile":
        fetch_file(folder.profile)
        return rate_by_profile(LayerProfile.load(folder.profile)) if folder.profile.exists() else None
    fetch_file(folder.measurements)
    if not folder.measurements.exists():
        return None
    found = LayerMeasurements.load(folder.measurements)
    by_name = {each.name: each for each in found.measurements}
    return rate_by_measurement(by_name[search.by]) if search.by in by_name else None


def measure_for_search(context: RunContext, model: ModelRef, search: SearchConfig) -> Rate | None:
    """What a profile-guided search orders its trials by, measured now where the run has not done so; None for others."""
    if not isinstance(search, ProfileSearchConfig):
        return None
    rate = find_rating(context.folder, search)
    if rate is not None:
        return rate
    say("sweep", f"measuring the layers of {model}: {search.by}")
    if search.by == "layer_profile":
        with tracked(context, "trace") as tracker:
            trace_model(
                model, context.config.trace, out_dir=context.folder.root, report=lambda line: say("trace", line)
            )
            tracker.log_artifact(context.folder.profile)
    else:
        path = context.folder.measurements
        there = [each.name for each in LayerMeasurements.load(path).measurements] if path.exists() else []
        measure(context, model, [name for name in MEASUREMENTS if name in (*there, search.by)])
    rate = find_rating(context.folder, search)
    assert rate is not None, "it was measured a moment ago"
    return rate
