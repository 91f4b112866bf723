"""The freeze plan: which parameters train, why, at what predicted cost; `freeze_plan.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, model_serializer, model_validator

from layerplan.artifacts import compute_sha256, read_sealed, write_sealed
from layerplan.config.base import StrictModel
from layerplan.errors import PlanError
from layerplan.plan.layer_profile import ModelIdentity, is_commit
from layerplan.plan.module_names import name_module
from layerplan.plan.plan_cost import NoCost, PredictedCost

SCHEMA_VERSION = 1
Modules = dict[int, tuple[str, ...]]
"""Names of the modules that train, by layer."""
Tied = Literal["untied", "frozen", "trained", "head_only"]


class _WithModules(StrictModel):
    """Writes `trainable_modules` only where there are any, so that plans of whole layers keep their bytes and hashes."""

    @model_serializer(mode="wrap")
    def _write_modules(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = dump(self)
        if not written.get("trainable_modules", True):
            del written["trainable_modules"]
        return written


class PlanPhase(_WithModules):
    """What trains from one step to the next phase; fields as in `FreezePlan`."""

    start_step: int = Field(ge=0)
    """First step of the phase, 0-based."""
    plan_type: str
    """Policy that made it."""
    trainable_layers: tuple[int, ...]
    """Sorted indices of the decoder layers that train, if only in part."""
    trainable_modules: Modules = Field(default_factory=dict)
    """Sorted names of the modules that train, by layer, of layers that train in part: as parameters are named inside the
    layer, without `weight` and `bias`, places in lists as `*`. Not written when every layer that trains does so whole."""
    train_embeddings: bool
    """Whether the input embedding trains."""
    train_final_norm: bool
    """Whether the norm after the last layer trains."""
    train_lm_head: bool
    """Whether the output head trains."""
    tied: Tied
    """State of tied embeddings."""


class FreezePlan(_WithModules):
    """The decision, with its evidence and its hash.

    A plan with `phases` changes during training; its own fields then name everything that trains at some time, so that
    what it calls frozen never moves.
    """

    schema_version: int = SCHEMA_VERSION
    """Version of this layout."""
    model: ModelIdentity
    """The model the plan was made for."""
    plan_type: str
    """Policy that made it."""
    trainable_layers: tuple[int, ...]
    """Sorted indices of the decoder layers that train, if only in part."""
    trainable_modules: Modules = Field(default_factory=dict)
    """Sorted names of the modules that train, by layer, of layers that train in part: as parameters are named inside the
    layer, without `weight` and `bias`, places in lists as `*`. Not written when every layer that trains does so whole."""
    train_embeddings: bool
    """Whether the input embedding trains."""
    train_final_norm: bool
    """Whether the norm after the last layer trains."""
    train_lm_head: bool
    """Whether the output head trains."""
    tied: Tied
    """State of tied embeddings; `head_only` trains the shared matrix through the head, its input path detached."""
    reason: str
    """One sentence on why these layers."""
    phases: tuple[PlanPhase, ...] = ()
    """Plans one after the other; empty when the plan does not change."""
    planned_steps: int | None = Field(default=None, ge=1)
    """Steps of the run the phases were made for."""
    optimizer_state: Literal["drop", "keep"] = "drop"
    """What a parameter that freezes at a change leaves behind."""
    rewarm_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises again after a change."""
    evidence: dict[str, Any] = Field(default_factory=dict)
    """Profile hash and what is behind the choice; `boundary` holds rule, scores, p and range of a measured boundary. A plan
    with `best_boundary` in its place was made under the first rule, which counted an empty side as 0."""
    predicted_cost: PredictedCost | NoCost = Field(default=None, json_schema_extra={"default": {}})
    """Output of the cost model for this plan beside `full`."""
    sha256: str = ""
    """Hash over every other field."""

    @field_serializer("predicted_cost", mode="wrap")
    def _write_cost(self, value: PredictedCost | None, dump: SerializerFunctionWrapHandler) -> Any:
        return {} if value is None else dump(value)

    @model_validator(mode="after")
    def _consistent(self) -> FreezePlan:
        num_layers = self.model.num_layers
        if list(self.trainable_layers) != sorted(set(self.trainable_layers)):
            raise ValueError(f"trainable_layers={self.trainable_layers} must be sorted and without repeats")
        if any(not 0 <= layer < num_layers for layer in self.trainable_layers):
            raise ValueError(f"trainable_layers={self.trainable_layers} must lie in 0..{num_layers - 1}")
        self._check_modules()
        if not (self.trainable_layers or self.train_embeddings or self.train_final_norm or self.train_lm_head):
            raise ValueError("the plan trains nothing")
        starts = [phase.start_step for phase in self.phases]
        if starts and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ValueError(f"phases start at {starts}; they must start at 0 and rise")
        strangers = {layer for phase in self.phases for layer in phase.trainable_layers} - set(self.trainable_layers)
        if strangers:
            raise ValueError(f"phases train layers {sorted(strangers)}, which trainable_layers does not name")
        for name in ("train_embeddings", "train_final_norm", "train_lm_head"):
            if not getattr(self, name) and any(getattr(phase, name) for phase in self.phases):
                raise ValueError(f"a phase has {name}=true, the plan itself {name}=false")
        ties = {phase.tied for phase in self.phases}
        for tied in ("trained", "head_only"):
            if tied in ties and self.tied != tied:
                raise ValueError(f"a phase has tied={tied!r}, the plan itself tied={self.tied!r}")
        if any(phase.plan_type == "full" for phase in self.phases) and len(self.trainable_layers) < num_layers:
            raise ValueError("a phase trains everything, but trainable_layers does not name every layer")
        return self

    def _check_modules(self) -> None:
        for layer, names in self.trainable_modules.items():
            if layer not in self.trainable_layers:
                raise ValueError(f"trainable_modules names layer {layer}, which trainable_layers does not")
            if not names or list(names) != sorted(set(names)):
                raise ValueError(f"trainable_modules of layer {layer} must be sorted, without repeats and not empty")
        if self.trainable_modules and self.plan_type == "full":
            raise ValueError("a full plan trains every layer whole")
        for phase in self.phases:
            for layer in phase.trainable_layers:
                mine, theirs = self.trainable_modules.get(layer), phase.trainable_modules.get(layer)
                if mine is not None and (theirs is None or not set(theirs) <= set(mine)):
                    raise ValueError(f"a phase trains more of layer {layer} than trainable_modules names")

    def trains(self, layer: int, parameter: str) -> bool:
        """Whether a parameter of a decoder layer trains, by its name inside the layer."""
        names = self.trainable_modules.get(layer)
        return layer in self.trainable_layers and (names is None or name_module(parameter) in names)

    def at_step(self, step: int) -> FreezePlan:
        """The plan of the phase that a 0-based step belongs to; the plan itself when it does not change."""
        if not self.phases:
            return self
        phase = [phase for phase in self.phases if phase.start_step <= step][-1]
        modules = {"trainable_modules": phase.trainable_modules}  # not dumped when there are none
        return self.model_copy(update={**phase.model_dump(exclude={"start_step"}), **modules, "phases": ()})

    def list_distinct_phases(self) -> list[tuple[int, FreezePlan]]:
        """(first step, plan) of every phase that trains something no earlier one trains alone; one without phases."""
        found: dict[str, tuple[int, FreezePlan]] = {}
        for phase in self.phases:
            content = phase.model_dump_json(exclude={"start_step"})
            found.setdefault(content, (phase.start_step, self.at_step(phase.start_step)))
        return list(found.values()) or [(0, self)]

    def next_change(self, step: int) -> int | None:
        """First step of the next phase after a 0-based step; None when no change follows."""
        return next((phase.start_step for phase in self.phases if phase.start_step > step), None)

    @property
    def trains_everything(self) -> bool:
        """Whether every parameter of the model trains, if only for a phase."""
        return self.plan_type == "full" or any(phase.plan_type == "full" for phase in self.phases)

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
        if self.model.weights_sha256 is None or self.model.weights_sha256 != model.weights_sha256:
            self._check_fields(model, ("num_layers", "model_type", "name", "revision", "weights_sha256"))

    def check_kind(self, model: ModelIdentity) -> None:
        """Refuses a model of another depth or type, as `check_model` does, when it is not made yet and has no weights.

        Raises:
            PlanError: Naming the first field that differs and both values.
        """
        self._check_fields(model, ("num_layers", "model_type"))

    def _check_fields(self, model: ModelIdentity, fields: Sequence[str]) -> None:
        mine: Mapping[str, Any] = self.model.model_dump()
        theirs = model.model_dump()
        for field in fields:
            if field == "revision" and is_commit(self.model.revision) != is_commit(model.revision):
                continue  # where a branch stood when the plan was made is not known
            if mine[field] != theirs[field] and None not in (mine[field], theirs[field]):
                raise PlanError(
                    f"freeze plan {self.sha256[:12]}: made for {field}={mine[field]!r},"
                    f" the model at hand has {field}={theirs[field]!r}"
                )
