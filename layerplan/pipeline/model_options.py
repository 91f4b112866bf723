"""Options only some kinds of models have, with what holds for the others."""

from __future__ import annotations

import logging
from pathlib import Path

from layerplan.config.run import RunConfig

logger = logging.getLogger(__name__)


def find_base(config: RunConfig) -> str:
    """Folder or hub id of the config's existing model; a GGUF file is converted first, once, beside the runs."""
    return find_named(config.model.name, config)  # type: ignore[union-attr]


def find_named(name: str, config: RunConfig) -> str:
    """The same for any name; the conversion lies where all runs of `storage_path` and all their nodes reach it."""
    return find_model(name, config.storage_path)


def find_model(name: str, storage_path: str = "runs") -> str:
    """Folder or hub id of a model; a GGUF file is converted, once, below `storage_path`."""
    if "://" not in name and not name.lower().endswith(".gguf"):
        return name  # spares a dry run the import
    from layerplan.models import gguf_cache

    return gguf_cache.find_model(name, Path(storage_path).expanduser(), report=logger.info)


def revision_of(config: RunConfig) -> str:
    """Revision of a hub model; `main` for models made here."""
    return getattr(config.model, "revision", "main")


def trusts_remote_code(config: RunConfig, model: str | None = None) -> bool:
    """Whether the user allowed the Python code of the config's model, or of this one.

    The consent is to one model's code, so it holds for that model and for what the run exports of it, not for any other.
    """
    is_allowed = bool(getattr(config.model, "trust_remote_code", False))
    if not is_allowed or model is None or model == getattr(config.model, "name", None):
        return is_allowed
    run = Path(config.storage_path).expanduser().resolve() / config.name
    return Path(model).expanduser().resolve().is_relative_to(run)
