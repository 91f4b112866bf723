"""Cheap looks at a run's inputs before a cluster starts: what is missing is said in seconds, not after minutes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from layerplan.config.model import PretrainedModelConfig, ScratchModelConfig
from layerplan.config.plan import FilePlanConfig
from layerplan.config.run import RunConfig
from layerplan.config.stitch import StitchedModelConfig
from layerplan.corpus.joining import read_joining
from layerplan.corpus.manifest import Manifest
from layerplan.corpus.schedule import check_enough
from layerplan.errors import ModelError
from layerplan.models.model_sizes import make_model_shape
from layerplan.models.ref import ModelRef
from layerplan.pipeline.base_facts import describe_base, describe_for_plan
from layerplan.pipeline.donors import check_donors, resolve_stitched
from layerplan.pipeline.model_options import find_base
from layerplan.pipeline.run_folder import locate_run_folder
from layerplan.plan import decide
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.storage.mirror import fetch_file


def check_model(config: RunConfig) -> None:
    """Looks at config, tokenizer and every stored tensor of an existing model, or of each donor of one put together.

    Raises:
        ModelError: When one is missing or they do not fit together, or kernels that its training asks for are not installed.
    """
    _check_kernels(config)
    if isinstance(config.model, ScratchModelConfig):
        return
    if isinstance(config.model, StitchedModelConfig):
        model, shape = check_donors(config, config.model)
    else:
        model = find_base(config)
        model.check()
        shape = model.shape()
    vocab_size = shape.vocab_size
    joining = read_joining(config.corpus, model.tokenizer_file())
    if joining.num_ids > vocab_size:
        raise ModelError(
            f"model.name={model}: documents can yield token {joining.facts.name(joining.num_ids - 1)}, the embedding has"
            f" {vocab_size:,} rows; the tokenizer does not fit the model"
        )


def _check_kernels(config: RunConfig) -> None:
    """Only whether they are installed: whether the worker's device runs them, the worker says."""
    kernels = config.train.mamba_kernels
    if kernels == "torch":
        return
    from layerplan.models.hybrid.mamba_kernels import INSTALLATION, PACKAGE

    if find_spec(PACKAGE) is None:
        raise ModelError(f"train.mamba_kernels={kernels}: needs mamba-ssm, which is not installed here; {INSTALLATION}")


def check_rows(config: RunConfig) -> None:
    """Raises `PlanError` when rows are longer than an existing model's positions; of a new one the config itself says so."""
    if isinstance(config.model, ScratchModelConfig):
        return
    if isinstance(config.model, StitchedModelConfig):
        shape = make_model_shape(resolve_stitched(config, config.model).config)
    else:
        shape = find_base(config).shape()
    shape.check_seq_len(config.corpus.seq_len)


def check_plan(config: RunConfig) -> None:
    """Raises `PlanError` when no plan can be made for the model, whatever is measured; one that the run has is not made anew."""
    folder = locate_run_folder(config)
    fetch_file(folder.plan)
    if not folder.plan.exists():
        decide.check_plan(config.plan, describe_for_plan(config, *describe_base(config)))


def check_plan_of_made(config: RunConfig, model: ModelRef) -> None:
    """Raises `PlanError` when a base that the run made itself is not the one a plan file names, of which only weights tell."""
    is_made = not isinstance(config.model, PretrainedModelConfig)
    if is_made and isinstance(config.plan, FilePlanConfig) and not locate_run_folder(config).plan.exists():
        FreezePlan.load(Path(config.plan.path).expanduser()).check_model(model.identity())


def check_store(config: RunConfig, store: Path | str) -> None:
    """Raises `CorpusError` when a store that was built holds less than a step takes, before anything is measured."""
    if config.corpus.mode != "on_the_fly":
        check_enough(Manifest.load(store).num_rows, config.train.global_batch_size)
