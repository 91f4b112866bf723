"""Options only some kinds of models have, with what holds for the others."""

from __future__ import annotations

import logging
from pathlib import Path

from layerplan.config.model import ScratchModelConfig
from layerplan.config.run import RunConfig
from layerplan.models.ref import ModelRef
from layerplan.pipeline.run_folder import locate_run_folder
from layerplan.storage.working import is_remote, make_private

logger = logging.getLogger(__name__)


def find_base(config: RunConfig) -> ModelRef:
    """The config's existing model; a GGUF file is converted first, once, beside the runs."""
    return find_named(config.model.name, config)  # type: ignore[union-attr]


def find_named(name: str, config: RunConfig) -> ModelRef:
    """The same for any folder, hub id or GGUF file, with the config's revision and consent where they are meant for it.

    The consent is to one model's code, so it holds for that model and for what the run exports of it, not for any other.
    A conversion lies where all runs of `storage_path` and all their nodes reach it; of runs in a bucket that is their
    working folder, from which a run sends it to the bucket.
    """
    run, own = locate_run_folder(config).root, config.model
    if is_remote(config.storage_path):
        make_private(run.parent)
    found = find_model(name, str(run.parent))
    if isinstance(own, ScratchModelConfig):
        return ModelRef(found)
    base = ModelRef(found, own.revision, own.trust_remote_code)
    if name == own.name:
        return base
    return base.at(found) if Path(found).expanduser().resolve().is_relative_to(run) else ModelRef(found)


def find_model(name: str, storage_path: str = "runs") -> str:
    """Folder or hub id of a model; a GGUF file is converted, once, below `storage_path`."""
    if "://" not in name and not name.lower().endswith(".gguf"):
        return name  # spares a dry run the import
    from layerplan.models import gguf_cache

    return gguf_cache.find_model(name, Path(storage_path).expanduser(), report=logger.info)
