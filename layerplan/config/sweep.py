"""What a sweep tries, in which order, and for how long."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from layerplan.config.base import StrictModel
from layerplan.config.plan import PlanOptions
from layerplan.config.search import GridSearchConfig, SearchConfig

Side = Literal["deep", "shallow", "spread"]
VALIDATION_LOSS = "validation_loss"


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class SweepConfig(StrictModel):
    """Ray Tune over boundary, side, ends, learning rate and seed; every trial is one training with its own plan."""

    boundaries: list[int] | None = None
    """Boundaries to try, each in 1..num_layers-1."""
    split_ratios: list[float] | None = None
    """Or shallow shares to try."""
    freeze: Annotated[list[Side], BeforeValidator(_as_list)] = Field(default=["deep"], min_length=1)
    """Which sides of each boundary freeze; `spread` freezes neither, but trains as many layers as lie above the boundary,
    evenly spaced over the depth. One may be given by itself."""
    ends: list[PlanOptions] | None = Field(default=None, min_length=1)
    """Choices for embeddings, final norm and head to try; left out, what `plan` says of them, else all three frozen."""
    learning_rates: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(default=None, min_length=1)
    """Peak learning rates to try; left out, that of `train.optimizer`."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(default=None, min_length=1)
    """Seeds of the data order to try; left out, the run's."""
    search: SearchConfig = GridSearchConfig()
    """Which trials of the space are run; a type alone may be given by its name."""
    max_steps: int = Field(default=100, ge=1)
    """Optimizer steps of one trial; with `equal: flops` those of training everything."""
    equal: Literal["tokens", "flops"] = "tokens"
    """What trials have in common: the tokens they see, or their predicted FLOPs, those of `max_steps` steps of training
    everything, so that a cheaper plan trains for more steps."""
    metric: str = VALIDATION_LOSS
    """What is to be low: `validation_loss` on the rows held out of the corpus, or the loss on one of `evaluation.held_out`,
    by its name."""
    max_concurrent_trials: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Trials that run at once; `auto` as many as the cluster has room for when the sweep starts."""
    scheduler: Literal["none", "asha"] = "none"
    """`asha` stops weak trials early, judged by `metric` at equal shares of their schedules."""
    grace_share: float = Field(default=0.25, gt=0, le=1)
    """Share of its schedule that `asha` leaves every trial."""
    reduction_factor: int = Field(default=4, ge=2)
    """Of the trials that reach a share of their schedules, `asha` lets the best of so many go on, to so many times that share."""

    @model_validator(mode="after")
    def _exactly_one(self) -> SweepConfig:
        if (self.boundaries is None) == (self.split_ratios is None):
            raise ValueError("give exactly one of sweep.boundaries and sweep.split_ratios")
        if not (self.boundaries or self.split_ratios):
            raise ValueError("sweep.boundaries or sweep.split_ratios must name at least one value")
        return self
