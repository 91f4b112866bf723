"""The donors of a base that is put together: found, looked at, and their layers assigned, from configs alone."""

from __future__ import annotations

from layerplan.config.run import RunConfig
from layerplan.config.stitch import StitchedModelConfig
from layerplan.models.model_sizes import make_model_shape
from layerplan.models.ref import ModelRef
from layerplan.models.stitching.recipe import Recipe, read_donor, resolve_recipe
from layerplan.pipeline.model_options import find_model
from layerplan.pipeline.run_folder import locate_run_folder
from layerplan.plan.model_shape import ModelShape


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
        donors[name] = read_donor(ref if from_published else ref.at_commit(), published=known)
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
