"""How layers are measured by the rivals of the tracer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from layerplan.config.base import StrictModel
from layerplan.config.labels import NodeLabels

Measurement = Literal["spectrum", "block_influence", "gradient_norm", "fisher", "pilot", "tuned_lens_gain"]
MEASUREMENTS: tuple[Measurement, ...] = (
    "spectrum",
    "block_influence",
    "gradient_norm",
    "fisher",
    "pilot",
    "tuned_lens_gain",
)


class MeasureConfig(StrictModel):
    """Options of the rival measurements; those that decide numbers are recorded beside them."""

    num_rows: int = Field(default=16, ge=2)
    """Rows of the corpus that are measured on; each is a repeat of the measurement."""
    seq_len: int = Field(default=256, ge=16)
    """Tokens of a row."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of rows and of drawn labels."""
    pilot_share: float = Field(default=0.05, gt=0, le=1)
    """Share of `train.max_steps` that `pilot` trains everything for; at least 4 steps."""
    pilot_rows: int = Field(default=4, ge=1)
    """Rows of a step of `pilot`."""
    lens_positions: int = Field(default=512, ge=64)
    """Positions whose predictions `tuned_lens_gain` compares; every one passes the head once for every layer."""
    num_actors: int = Field(default=1, ge=1)
    """Processes that measure side by side, each with a model of its own."""
    num_cpus_per_actor: float = Field(default=0.5, ge=0)
    """CPU share each of them reserves on Ray."""
    num_gpus_per_actor: float = Field(default=0.0, ge=0)
    """GPU share each of them reserves; fractions are allowed."""
    labels: NodeLabels = {}
    """Nodes that they may be on, by Ray's labels: `{ray.io/accelerator-type: L4}`. All must hold."""
