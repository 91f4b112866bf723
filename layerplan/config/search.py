"""How a sweep goes through its space: everything, a draw, Optuna's suggestions, or in the order of a measurement."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from layerplan.config.base import StrictModel
from layerplan.config.measure import Measurement


class GridSearchConfig(StrictModel):
    """Every trial of the space, in order."""

    type: Literal["grid"] = "grid"


class RandomSearchConfig(StrictModel):
    """Trials drawn from the space, none twice."""

    type: Literal["random"] = "random"
    num_trials: int = Field(ge=1)
    """Trials to run; the whole space when it has fewer."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draw; more trials of the same seed begin with the same ones."""


class OptunaSearchConfig(StrictModel):
    """Trials that Optuna's TPE sampler suggests from the results so far, none twice."""

    type: Literal["optuna"] = "optuna"
    num_trials: int = Field(ge=1)
    """Trials to run; the whole space when it has fewer."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampler."""


class ProfileSearchConfig(StrictModel):
    """Trials in the order of a measurement, and only those that may still win; docs/sweeps.md has the rule."""

    type: Literal["profile"] = "profile"
    by: Literal["layer_profile"] | Measurement = "layer_profile"
    """What is measured: the tracer's alignment score, or one of its rivals."""
    margin: float = Field(default=0.01, ge=0)
    """Difference of two losses, nats a token, that decides nothing between their trials."""


def _read_type(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


SearchConfig = Annotated[
    Annotated[
        GridSearchConfig | RandomSearchConfig | OptunaSearchConfig | ProfileSearchConfig, Field(discriminator="type")
    ],
    BeforeValidator(_read_type),
]
