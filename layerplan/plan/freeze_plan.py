"""The freeze plan: which parameters train, why, at what predicted cost; `freeze_plan.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from layerplan.config.base import StrictModel
from layerplan.errors import PlanError
from layerplan.plan.hashing import compute_sha256
from layerplan.plan.layer_profile import ModelIdentity, read_sealed, write_sealed

SCHEMA_VERSION = 1


class FreezePlan(StrictModel):
    """The decision, with its evidence and its hash."""

    schema_version: int = SCHEMA_VERSION
    """Version of this layout."""
    model: ModelIdentity
    """The model the plan was made for."""
    plan_type: str
    """Policy that made it."""
    trainable_layers: tuple[int, ...]
    """Sorted indices of the decoder layers that train."""
    train_embeddings: bool
    """Whether the input embedding trains."""
    train_final_norm: bool
    """Whether the norm after the last layer trains."""
    train_lm_head: bool
    """Whether the output head trains."""
    tied: Literal["untied", "frozen", "trained", "head_only"]
    """State of tied embeddings; `head_only` trains the shared matrix through the head, its input path detached."""
    reason: str
    """One sentence on why these layers."""
    evidence: dict[str, Any] = Field(default_factory=dict)
    """Profile hash and the scores behind the choice."""
    predicted_cost: dict[str, Any] = Field(default_factory=dict)
    """Output of the cost model for this plan beside `full`."""
    sha256: str = ""
    """Hash over every other field."""

    @model_validator(mode="after")
    def _consistent(self) -> FreezePlan:
        num_layers = self.model.num_layers
        if list(self.trainable_layers) != sorted(set(self.trainable_layers)):
            raise ValueError(f"trainable_layers={self.trainable_layers} must be sorted and without repeats")
        if any(not 0 <= layer < num_layers for layer in self.trainable_layers):
            raise ValueError(f"trainable_layers={self.trainable_layers} must lie in 0..{num_layers - 1}")
        if not (self.trainable_layers or self.train_embeddings or self.train_final_norm or self.train_lm_head):
            raise ValueError("the plan trains nothing")
        return self

    @property
    def frozen_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers that stay as they are."""
        return tuple(layer for layer in range(self.model.num_layers) if layer not in set(self.trainable_layers))

    def sealed(self) -> FreezePlan:
        """Returns a copy whose hash matches its content."""
        return self.model_copy(update={"sha256": compute_sha256(self.model_dump(mode="json", exclude={"sha256"}))})

    def save(self, path: Path) -> None:
        """Writes the sealed plan as JSON."""
        write_sealed(path, self.sealed())

    @classmethod
    def load(cls, path: Path) -> FreezePlan:
        """Reads a plan; raises `PlanError` when it is missing, malformed or changed."""
        return read_sealed(path, cls)

    def check_model(self, model: ModelIdentity) -> None:
        """Refuses a model the plan was not made for; equal weights are the same model, wherever the folder lies.

        Raises:
            PlanError: Naming the first field that differs and both values.
        """
        mine: Mapping[str, Any] = self.model.model_dump()
        theirs = model.model_dump()
        if self.model.weights_sha256 is not None and self.model.weights_sha256 == model.weights_sha256:
            return
        for field in ("num_layers", "model_type", "name", "revision", "weights_sha256"):
            if mine[field] != theirs[field] and None not in (mine[field], theirs[field]):
                raise PlanError(
                    f"freeze plan {self.sha256[:12]}: made for {field}={mine[field]!r},"
                    f" the model at hand has {field}={theirs[field]!r}"
                )
