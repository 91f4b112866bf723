"""Config values of common bases as their authors published them, so that plans for them are priced without a network.

Only sizes are taken from here. A run reads the model itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from layerplan.models.model_sizes import make_model_shape
from layerplan.models.ref import ModelRef
from layerplan.plan.model_shape import ModelShape


@lru_cache(maxsize=1)
def list_published() -> Mapping[str, Mapping[str, Any]]:
    """Config values by hub id; names of one entry share a shape."""
    entries = json.loads(files("layerplan.models").joinpath("published.json").read_text(encoding="utf-8"))
    return {name: entry["config"] for entry in entries for name in entry["names"]}


def find_published(name: str, *, revision: str = "main") -> Mapping[str, Any] | None:
    """Config values of a hub id; None when it is a folder, another revision, or not among them."""
    if revision != "main" or Path(name).expanduser().is_dir():
        return None
    return list_published().get(name)


def load_shape_and_type(model: ModelRef) -> tuple[ModelShape, str]:
    """Sizes and model type, from what is published where it can be.

    Raises:
        ModelError: When the config is missing or no causal language model can be built from it.
    """
    published = find_published(model.name, revision=model.revision)
    if published is not None:
        return make_model_shape(published), str(published["model_type"])
    return model.shape(), str(model.config()["model_type"])
