"""Options only some kinds of models have, with what holds for the others."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from layerplan.config.model import PretrainedModelConfig
from layerplan.config.run import RunConfig
from layerplan.config.stitch import StitchedModelConfig
from layerplan.models.ref import ModelRef
from layerplan.pipeline.run_folder import locate_run_folder
from layerplan.pipeline.same_base import find_noted_commit
from layerplan.plan.stitch_report import LayerOrigin, StitchReport
from layerplan.run_folder import STITCH_NAME, STITCHED_NAME
from layerplan.storage.working import is_remote, make_private

logger = logging.getLogger(__name__)


def find_base(config: RunConfig) -> ModelRef:
    """The config's existing model; a GGUF file is converted first, once, beside the runs; one that is put together lies there."""
    if isinstance(config.model, StitchedModelConfig):
        return find_named(str(locate_run_folder(config).base_model / STITCHED_NAME), config)
    return find_named(config.model.name, config)  # type: ignore[union-attr]


def find_named(name: str, config: RunConfig) -> ModelRef:
    """The same for any folder, hub id or GGUF file, with the config's revision and consent where they are meant for it.

    A hub id's revision is the commit at which the run was begun, once it is.
    The consent is to one model's code, so it holds for that model and for what the run exports of it, not for any other.
    A conversion lies where all runs of `storage_path` and all their nodes reach it; of runs in a bucket that is their
    working folder, from which a run sends it to the bucket.
    """
    folder, own = locate_run_folder(config), config.model
    run = folder.root
    if is_remote(config.storage_path):
        make_private(run.parent)
    found = find_model(name, str(run.parent))
    is_own = Path(found).expanduser().resolve().is_relative_to(run)
    if not isinstance(own, PretrainedModelConfig):
        donors = own.donors.values() if isinstance(own, StitchedModelConfig) else ()
        return ModelRef(found, trust_remote_code=is_own and any(donor.trust_remote_code for donor in donors))
    base = ModelRef(found, own.revision, own.trust_remote_code)
    if name == own.name:
        return replace(base, revision=find_noted_commit(folder) or own.revision)
    return base.at(found) if is_own else ModelRef(found)


def is_converted(name: str) -> bool:
    """Whether a name is not that of the model's own folder or id: a GGUF file, by its path or in an installed package."""
    return "://" in name or name.lower().endswith(".gguf")


def find_model(name: str, storage_path: str = "runs") -> str:
    """Folder or hub id of a model; a GGUF file is converted, once, below `storage_path`."""
    if not is_converted(name):
        return name  # spares a dry run the import
    from layerplan.models import gguf_cache

    return gguf_cache.find_model(name, Path(storage_path).expanduser(), report=logger.info)


def read_origins(model: ModelRef) -> tuple[LayerOrigin, ...] | None:
    """Where the layers of a stitched model, or of what was exported of one, come from; None for any other.

    Raises:
        PlanError: When it cannot be read or was changed.
    """
    path = Path(model.name).expanduser() / STITCH_NAME
    return StitchReport.load(path).layers if path.is_file() else None
