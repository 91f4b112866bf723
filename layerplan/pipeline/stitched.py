"""A base put together from donors, made once by the run."""

from __future__ import annotations

from pathlib import Path

from layerplan.aside import writing_folder_aside
from layerplan.config.stitch import StitchedModelConfig
from layerplan.models.ref import ModelRef
from layerplan.pipeline.donors import resolve_stitched
from layerplan.pipeline.model_options import find_base
from layerplan.pipeline.stages import RunContext, say, tracked
from layerplan.run_folder import BASE_MODEL_NAME, STITCH_NAME


def make_stitched(context: RunContext, spec: StitchedModelConfig) -> ModelRef:
    """The model in the run's folder, made when it is not there."""
    model = find_base(context.config)
    folder = Path(model.name)
    if (folder / STITCH_NAME).exists():
        say("base", f"found {folder}")
        return model
    from layerplan.models.stitching.build import write_stitched

    with tracked(context, BASE_MODEL_NAME) as tracker:
        tracker.log_params(spec.model_dump(mode="json"))
        say("base", f"putting together {', '.join(donor.name for donor in spec.donors.values())}")
        recipe = resolve_stitched(context.config, spec)
        with writing_folder_aside(folder) as made:
            report = write_stitched(recipe, made, seed=context.config.seed)
        for line in report.describe():
            say("base", line)
        tracker.log_artifact(folder / STITCH_NAME)
    context.folder.carry()
    return model
