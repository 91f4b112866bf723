"""What a boundary sweep tries."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from layerplan.config.base import StrictModel


class SweepConfig(StrictModel):
    """Ray Tune over boundaries; every trial is one training run with its own plan."""

    boundaries: list[int] | None = None
    """Boundaries to try, each in 1..num_layers-1."""
    split_ratios: list[float] | None = None
    """Or shallow shares to try."""
    freeze: Literal["deep", "shallow"] = "deep"
    """Which side of each boundary freezes."""
    max_steps: int = Field(default=100, ge=1)
    """Optimizer steps of one trial."""
    max_concurrent_trials: int = Field(default=1, ge=1)
    """Trials that run at once."""
    scheduler: Literal["none", "asha"] = "none"
    """`asha` stops weak trials early, judged by the validation loss per step."""

    @model_validator(mode="after")
    def _exactly_one(self) -> SweepConfig:
        if (self.boundaries is None) == (self.split_ratios is None):
            raise ValueError("give exactly one of sweep.boundaries and sweep.split_ratios")
        if not (self.boundaries or self.split_ratios):
            raise ValueError("sweep.boundaries or sweep.split_ratios must name at least one value")
        return self
