"""Options only some kinds of models have, with what holds for the others."""

from __future__ import annotations

from layerplan.config.run import RunConfig


def revision_of(config: RunConfig) -> str:
    """Revision of a hub model; `main` for models made here."""
    return getattr(config.model, "revision", "main")


def trusts_remote_code(config: RunConfig) -> bool:
    """Whether the user allowed the model's own Python code."""
    return bool(getattr(config.model, "trust_remote_code", False))
