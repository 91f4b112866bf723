"""What is known of a run's base before it is made or loaded: sizes, type, identity, and where its layers will come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from layerplan.config.model import PretrainedModelConfig, ScratchModelConfig
from layerplan.config.plan import FilePlanConfig
from layerplan.config.run import RunConfig
from layerplan.config.stitch import StitchedModelConfig
from layerplan.models.scratch_config import make_hf_config
from layerplan.pipeline.model_options import find_base, read_origins
from layerplan.plan.decide import PlanContext
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.stitch_report import LayerOrigin


def describe_base(config: RunConfig, *, from_published: bool = False) -> tuple[ModelIdentity, ModelShape]:
    """Name, type and sizes of the model; one that is made on the spot need not be built to be known.

    Args:
        config: Of the run.
        from_published: Take what is published of a common model's sizes, so that it need not be at hand.

    Raises:
        ModelError: When a config is missing, or no causal language model can be built from it.
    """
    shape, model_type = _read_shape(config, from_published)
    is_made = not isinstance(config.model, PretrainedModelConfig)
    name = config.model.type if is_made else Path(find_base(config).name).name
    return ModelIdentity(name=name, model_type=model_type, num_layers=shape.num_layers), shape


def describe_for_plan(
    config: RunConfig, model: ModelIdentity, shape: ModelShape, *, from_published: bool = False
) -> PlanContext:
    """What a plan may depend on before anything is measured; weights are hashed only for a plan file, which names theirs."""
    is_identified = False
    if isinstance(config.plan, FilePlanConfig) and isinstance(config.model, PretrainedModelConfig):
        base = find_base(config)
        is_folder = Path(base.name).expanduser().is_dir()
        is_identified = not is_folder or any(Path(base.name).expanduser().glob("*.safetensors"))
        if not is_folder:
            model = model.model_copy(update={"name": base.name, "revision": base.revision})
        elif is_identified:
            model = base.identity()
    origins = read_base_origins(config, from_published=from_published)
    return PlanContext(model, shape, config.train, config.corpus.seq_len, origins=origins, is_identified=is_identified)


def read_base_origins(config: RunConfig, *, from_published: bool = False) -> tuple[LayerOrigin, ...] | None:
    """Where the layers will come from, or do; None for a model that was not put together."""
    if isinstance(config.model, StitchedModelConfig):
        from layerplan.pipeline.donors import resolve_stitched

        return resolve_stitched(config, config.model, from_published=from_published).layers
    return None if isinstance(config.model, ScratchModelConfig) else read_origins(find_base(config))


def _read_shape(config: RunConfig, from_published: bool) -> tuple[ModelShape, str]:
    if isinstance(config.model, ScratchModelConfig):
        values = make_hf_config(config.model, vocab_size=config.model.vocab_size)
        return ModelShape.from_hf_config(values), str(values["model_type"])
    if isinstance(config.model, StitchedModelConfig):
        from layerplan.models.model_sizes import make_model_shape
        from layerplan.pipeline.donors import resolve_stitched

        values = resolve_stitched(config, config.model, from_published=from_published).config
        return make_model_shape(values), str(values["model_type"])
    base = find_base(config)
    if from_published:
        from layerplan.models.published import load_shape_and_type

        return load_shape_and_type(replace(base, revision=config.model.revision))
    return base.shape(), str(base.config()["model_type"])
