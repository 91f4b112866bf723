"""Options only some kinds of models have, with what holds for the others."""

from __future__ import annotations

from pathlib import Path

from layerplan.config.run import RunConfig


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
