"""Numbers per layer that somebody may choose layers by, as values: `layer_measurements.json`.

A measurement says nothing about what is done with it: `layerplan/plan/measured.py` makes layers of it, and the plan
carries its hash. Lists over layers are indexed by `layer_idx`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from layerplan.artifacts import compute_sha256, read_sealed, write_sealed
from layerplan.config.base import StrictModel
from layerplan.errors import PlanError
from layerplan.plan.layer_profile import ModelIdentity

SCHEMA_VERSION = 1


class MeasuredText(StrictModel):
    """The text a measurement was made on."""

    sources: list[str] = Field(min_length=1)
    """Paths as configured, or the token store."""
    num_rows: int = Field(ge=1)
    """Rows measured on."""
    seq_len: int = Field(ge=2)
    """Tokens of a row."""
    sha256: str
    """Hash of the rows' token ids."""


class MeasuringCost(StrictModel):
    """What a measurement cost; the time depends on the machine and is in no hash of the numbers."""

    seconds: float | None = Field(ge=0)
    """Time in the processes that measured, loading the model left out; None where nobody took it."""
    flops: float = Field(ge=0)
    """Predicted products and sums."""
    tokens: int = Field(ge=0)
    """Tokens that passed the model; 0 where only weights were read."""


class LayerMeasurement(StrictModel):
    """One number per layer, how often it was taken, and which end of it says that a layer should train."""

    name: str
    """Of the measurement."""
    values: list[float] = Field(min_length=1)
    """One per layer."""
    higher_trains: bool = True
    """Whether large values speak for training a layer."""
    repeats: list[list[float | None]] = Field(default_factory=list)
    """The same numbers by what is repeated, one row each; None where a layer has none."""
    repeated_over: str = ""
    """What the rows are: `rows of text`, `steps`, `kinds of matrices`, `groups of probes`."""
    repeat_names: list[str] = Field(default_factory=list)
    """Names of the rows of `repeats`, where they have any."""
    text: MeasuredText | None = None
    """What it was measured on; None for weights alone."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options that decide the numbers."""
    cost: MeasuringCost
    """What it cost."""

    @model_validator(mode="after")
    def _fits(self) -> LayerMeasurement:
        if not all(map(math.isfinite, self.values)):
            raise ValueError(f"{self.name}: a value is not finite")
        if any(len(row) != len(self.values) for row in self.repeats):
            raise ValueError(f"{self.name}: every repeat must have {len(self.values)} values, one per layer")
        if self.repeat_names and len(self.repeat_names) != len(self.repeats):
            raise ValueError(f"{self.name}: {len(self.repeat_names)} names for {len(self.repeats)} repeats")
        return self

    @property
    def sha256(self) -> str:
        """Hash of the numbers and of all that decides them, which measuring again gives again."""
        return compute_sha256(self.model_dump(mode="json", exclude={"cost"}))

    @property
    def turned_values(self) -> list[float]:
        """Values of which large ones speak for training."""
        return self.values if self.higher_trains else [-value for value in self.values]

    @property
    def turned_repeats(self) -> list[list[float | None]]:
        """Repeats of which large values speak for training."""
        if self.higher_trains:
            return self.repeats
        return [[None if value is None else -value for value in row] for row in self.repeats]

    def rank(self, *, from_worst: bool = False) -> list[int]:
        """Layers by how much the measurement speaks for training them, the lowest index first among equals."""
        values, sign = self.turned_values, 1.0 if from_worst else -1.0
        return sorted(range(len(values)), key=lambda layer: (sign * values[layer], layer))


class LayerMeasurements(StrictModel):
    """Measurements of one model, sealed."""

    schema_version: int = SCHEMA_VERSION
    """Version of this layout."""
    model: ModelIdentity
    """The measured model."""
    measurements: list[LayerMeasurement] = Field(min_length=1)
    """In the order they were asked for."""
    sha256: str = ""
    """Hash over every other field."""

    @model_validator(mode="after")
    def _fits(self) -> LayerMeasurements:
        for each in self.measurements:
            if len(each.values) != self.model.num_layers:
                raise ValueError(f"{each.name}: {len(each.values)} values for {self.model.num_layers} layers")
        return self

    def find(self, name: str) -> LayerMeasurement:
        """One of them by name; raises `PlanError` when it is not there."""
        found = next((each for each in self.measurements if each.name == name), None)
        if found is None:
            there = ", ".join(each.name for each in self.measurements)
            raise PlanError(
                f"plan.type={name}: the measurements at hand are {there}; measure it with layerplan measure"
            )
        return found

    def sealed(self) -> LayerMeasurements:
        """Returns a copy whose hash matches its content."""
        return self.model_copy(update={"sha256": compute_sha256(self.model_dump(mode="json", exclude={"sha256"}))})

    def save(self, path: Path) -> None:
        """Writes the sealed measurements as JSON."""
        write_sealed(path, self.sealed())

    @classmethod
    def load(cls, path: Path) -> LayerMeasurements:
        """Reads measurements; raises `PlanError` when they are missing, malformed or changed."""
        return read_sealed(path, cls)
