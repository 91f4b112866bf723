"""A model that layers are taken from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerplan.models.ref import ModelRef


@dataclass(frozen=True)
class Donor:
    """A donor by its files' own words."""

    ref: ModelRef
    config: Mapping[str, Any]
    """The values of its `config.json`."""
    num_layers: int
