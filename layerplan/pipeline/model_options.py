"""Options only some kinds of models have, with what holds for the others."""

from __future__ import annotations

from pathlib import Path

from layerplan.config.run import RunConfig
from layerplan.pipeline.run_folder import locate_run_folder
from layerplan.storage.working import is_remote, make_private

PREFIX = "[model] "


def find_base(config: RunConfig) -> str:
    """Folder or hub id of the config's existing model; a GGUF file is converted first, once, beside the runs."""
    return find_named(config.model.name, config)  # type: ignore[union-attr]


def find_named(name: str, config: RunConfig) -> str:
    """The same for any name; the conversion lies where all runs of `storage_path` and all their nodes reach it.

    Of runs in a bucket that is their working folder, from which a run sends it to the bucket.
    """
    folder = locate_run_folder(config).root.parent
    if is_remote(config.storage_path):
        make_private(folder)
    return find_model(name, str(folder))


def find_model(name: str, storage_path: str = "runs") -> str:
    """Folder or hub id of a model; a GGUF file is converted, once, below `storage_path`."""
    if "://" not in name and not name.lower().endswith(".gguf"):
        return name  # spares a dry run the import
    from layerplan.models import gguf_cache

    return gguf_cache.find_model(name, Path(storage_path).expanduser(), report=_say)


def _say(line: str) -> None:
    print(PREFIX + line, flush=True)


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
    run = locate_run_folder(config).root
    return Path(model).expanduser().resolve().is_relative_to(run)
