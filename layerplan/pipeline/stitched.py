"""A base put together from donors: checked before anything starts, priced from configs alone, made once by the run."""

from __future__ import annotations

from pathlib import Path

from layerplan.aside import writing_folder_aside
from layerplan.config.run import RunConfig
from layerplan.config.stitch import StitchedModelConfig
from layerplan.models.model_sizes import make_model_shape
from layerplan.models.ref import ModelRef
from layerplan.models.stitching.recipe import Recipe, read_donor, resolve_recipe
from layerplan.pipeline.model_options import find_base, find_model
from layerplan.pipeline.run_folder import locate_run_folder
from layerplan.pipeline.stages import RunContext, say, tracked
from layerplan.plan.model_shape import ModelShape
from layerplan.run_folder import BASE_MODEL_NAME, STITCH_NAME


def resolve_stitched(config: RunConfig, spec: StitchedModelConfig, *, from_published: bool = False) -> Recipe:
    """The recipe of a config's model.

    Args:
        config: Of the run.
        spec: Its model.
        from_published: Take what is published of a common donor's sizes, so that it need not be at hand.

    Raises:
        ModelError: When a donor's config is missing, or the spec does not fit the donors.
    """
    from layerplan.models.published import find_published

    storage = str(locate_run_folder(config).root.parent)
    donors = {}
    for name, donor in spec.donors.items():
        ref = ModelRef(find_model(donor.name, storage), donor.revision, donor.trust_remote_code)
        known = find_published(ref.name, revision=ref.revision) if from_published else None
        donors[name] = read_donor(ref, published=known)
    return resolve_recipe(spec, donors)


def check_donors(config: RunConfig, spec: StitchedModelConfig) -> tuple[ModelRef, ModelShape]:
    """Looks at every donor's files and at the recipe; gives the donor of the tokenizer, and the model's sizes.

    Raises:
        ModelError: For a donor that is no base, or a recipe that cannot be followed.
    """
    recipe = resolve_stitched(config, spec)
    for donor in recipe.donors.values():
        donor.ref.check()
    return recipe.donors[recipe.embeddings].ref, make_model_shape(recipe.config)


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
