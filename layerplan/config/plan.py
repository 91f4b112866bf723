"""Which layers train: one union on `type`, turned into a `FreezePlan` by `layerplan.plan.policies`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from layerplan.config.base import StrictModel
from layerplan.config.measure import Measurement

BoundaryRule = Literal["paper", "change_point"]
DEFAULT_MIN_SIDE = 2


class PlanOptions(StrictModel):
    """What every plan type decides beside its decoder layers. The paper's partial plans freeze all three."""

    train_embeddings: bool = False
    """Train the input embedding."""
    train_final_norm: bool = False
    """Train the norm after the last decoder layer."""
    train_lm_head: bool = False
    """Train the output head."""
    tied: Literal["frozen", "trained", "head_only"] | None = None
    """The one choice for tied embeddings: freeze both sides, train both, or train the head with the input path detached.
    Left out, it follows `train_embeddings` and `train_lm_head` when they agree."""


class LayerPlanOptions(PlanOptions):
    """Options of plans that choose decoder layers once."""

    modules: list[Annotated[str, Field(min_length=1)]] | None = Field(default=None, min_length=1)
    """Train only these modules of the chosen layers and freeze the rest of them: names inside a layer (`mlp.down_proj`), all
    below a part of it (`mlp`), or patterns with `*` and `?` (`*_proj`). Left out, the layers train whole."""


class FullPlanConfig(StrictModel):
    """Every parameter trains."""

    type: Literal["full"] = "full"


class BoundaryPlanOptions(LayerPlanOptions):
    """A plan cut at one boundary; give `boundary` or `split_ratio`, not both."""

    boundary: int | None = Field(default=None, ge=1)
    """k in 1..num_layers-1: layers [0, k) are shallow, [k, num_layers) deep."""
    split_ratio: float | None = Field(default=None, gt=0, lt=1)
    """Shallow share of the layers; becomes k = clamp(floor(ratio * L + 1/2), 1, L - 1)."""

    @model_validator(mode="after")
    def _exactly_one(self) -> BoundaryPlanOptions:
        if (self.boundary is None) == (self.split_ratio is None):
            raise ValueError(
                f"give exactly one of boundary and split_ratio (got boundary={self.boundary}, split_ratio={self.split_ratio})"
            )
        return self


class FreezeDeepPlanConfig(BoundaryPlanOptions):
    """Layers [boundary, L) freeze; the shallow ones train (the paper's proposal)."""

    type: Literal["freeze_deep"] = "freeze_deep"


class FreezeShallowPlanConfig(BoundaryPlanOptions):
    """Layers [0, boundary) freeze; the deep ones train."""

    type: Literal["freeze_shallow"] = "freeze_shallow"


class BoundaryOptions(StrictModel):
    """How a measurement decides a boundary. The defaults were fixed before any model was looked at; see docs/tracer.md."""

    rule: BoundaryRule = "change_point"
    """What is largest at the boundary: S(k) itself (`paper`, Eq. 7), or S(k) sqrt(k (L - k)) / L (`change_point`), the
    standardised difference of means, which does not favour the ends."""
    min_side: int = Field(default=DEFAULT_MIN_SIDE, ge=1)
    """Fewest layers on either side of the boundary, under `change_point`."""
    without_evidence: Literal["midpoint", "best", "error"] = "midpoint"
    """What happens when layers in other orders score as well (p of 0.05 or more): boundary L // 2, the best boundary all the
    same, or an error."""


class FromProfilePlanConfig(BoundaryOptions, LayerPlanOptions):
    """The boundary of the layer profile's alignment score S (Eq. 7), if the measurement supports one; the deep side freezes."""

    type: Literal["from_profile"] = "from_profile"
    freeze: Literal["deep", "shallow"] = "deep"
    """Which side of the chosen boundary freezes."""


class SemanticPlanConfig(LayerPlanOptions):
    """SALF: layers before the profile's end-of-freezing layer freeze."""

    type: Literal["semantic"] = "semantic"
    deviation: Literal["cosine", "ce", "rank"] = "cosine"
    """Which semantic deviation decides."""


class ExplicitPlanConfig(LayerPlanOptions):
    """The layers named by selectors train, everything else freezes."""

    type: Literal["explicit"] = "explicit"
    trainable: list[str | int] = Field(min_length=1)
    """Selectors: an index (`3`, `-1`), a half-open range (`0:9`), a share from either end (`first:0.5`, `last:1/3`),
    a regular expression over `model.layers.N.` and the ends (`re:layers\\.(0|5)\\.`), a role (`role:lm_head`,
    `role:mamba2`), or the top of a metric (`top:4:sensitivity`)."""


class TopKSensitivityPlanConfig(LayerPlanOptions):
    """The k layers with the largest mean sensitivity train; they need not be neighbours."""

    type: Literal["top_k_sensitivity"] = "top_k_sensitivity"
    k: int = Field(ge=1)
    """How many layers train."""


class RandomPlanConfig(LayerPlanOptions):
    """Control: k layers drawn with a seed."""

    type: Literal["random"] = "random"
    k: int = Field(ge=1)
    """How many layers train."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draw."""


class SpreadPlanConfig(LayerPlanOptions):
    """k layers evenly spaced over the depth, the middles of k equal stretches: no measurement, no draw."""

    type: Literal["spread"] = "spread"
    k: int = Field(ge=1)
    """How many layers train."""


class ReversePlanConfig(BoundaryOptions, LayerPlanOptions):
    """Control: as many layers as `from_profile` would train, taken from the other end."""

    type: Literal["reverse"] = "reverse"


class MidpointPlanConfig(LayerPlanOptions):
    """Control: boundary L // 2, the guess without a measurement."""

    type: Literal["midpoint"] = "midpoint"
    freeze: Literal["deep", "shallow"] = "deep"
    """Which side freezes."""


class StitchedPlanConfig(PlanOptions):
    """The plan that matches a stitched model: what was added trains and what donors gave freezes, or the reverse."""

    type: Literal["stitched"] = "stitched"
    train: Literal["new", "donor"] = "new"
    """Which layers train: those that were initialised or copied in, or those taken over from donors."""


class MeasuredPlanConfig(LayerPlanOptions):
    """The layers a rival measurement speaks for; `measure` says how it is taken, `docs/measurements.md` what it is."""

    type: Measurement
    """Which number decides: signal to noise of the weights, change of the residual stream, norm of the gradient, Fisher
    information, loss saved in a short training of everything, or gain of the tuned lens."""
    select: Literal["top", "boundary"] = "top"
    """`top` trains the best layers, wherever they lie; `boundary` one side of the largest step of the values."""
    unit: Literal["layer", "module"] = "layer"
    """With `top` of `spectrum`: whether whole layers are chosen, or single weight matrices, each among those of its kind."""
    k: int | None = Field(default=None, ge=1)
    """With `top`: how many layers train."""
    top_share: float | None = Field(default=None, gt=0, le=1)
    """With `unit: module`: share of the layers in which each kind of matrix trains, rounded down, as Spectrum has it."""
    max_flops_share: float | None = Field(default=None, gt=0, le=1)
    """With `top`, in place of `k` and `top_share`: as many as cost at most this share of the FLOPs of training everything."""
    freeze: Literal["deep", "shallow", "either"] = "either"
    """With `boundary`: which side may freeze."""
    min_side: int = Field(default=DEFAULT_MIN_SIDE, ge=1)
    """With `boundary`: fewest layers on either side."""
    end: Literal["best", "worst"] = "best"
    """`worst` takes the layers the measurement speaks against: a control."""
    without_evidence: Literal["best", "error"] = "best"
    """What happens when its null test has a p of 0.05 or more: the choice stands with its p, or an error."""

    @model_validator(mode="after")
    def _one_number(self) -> MeasuredPlanConfig:
        given = [name for name in ("k", "top_share", "max_flops_share") if getattr(self, name) is not None]
        if self.unit == "module":
            self._check_module_unit()
        if self.select == "boundary" and given:
            raise ValueError(f"{given[0]} belongs to select=top; leave it out, or set select: top")
        allowed = ("k" if self.unit == "layer" else "top_share", "max_flops_share")
        if self.select == "top" and (len(given) != 1 or given[0] not in allowed):
            raise ValueError(
                f"with unit={self.unit} give exactly one of {allowed[0]} and {allowed[1]} (got {', '.join(given) or 'none'})"
                + (", or set select: boundary" if self.unit == "layer" else "")
            )
        return self

    def _check_module_unit(self) -> None:
        if self.type != "spectrum":
            raise ValueError(f"unit=module: only spectrum measures single matrices, {self.type} measures layers")
        for name, value, allowed in (("select", self.select, "top"), ("modules", self.modules, None)):
            if value != allowed:
                raise ValueError(f"{name}={value} does not go with unit=module, which chooses modules itself")
        if self.without_evidence == "error":
            raise ValueError(
                "without_evidence=error does not go with unit=module: a matrix has one number and no repeats to test it by"
            )


class RecommendedPlanConfig(StrictModel):
    """What a finished study found best for a preference, under a limit; the plan names the study and says how much it says."""

    type: Literal["recommended"] = "recommended"
    prefer: Literal["adaptation", "retention", "balanced"]
    """What is to be low: the loss on the new text, that on text the base knows, or both alike, each as a share of what the
    study's plans spread over."""
    max_flops_share: float | None = Field(default=None, gt=0, le=1)
    """FLOPs per token as a share of training everything; left out, any."""


class FilePlanConfig(StrictModel):
    """A `freeze_plan.json` made earlier; its hash is checked on load."""

    type: Literal["file"] = "file"
    path: str = Field(min_length=1)
    """Path of the plan."""


class BudgetPlanConfig(BoundaryOptions):
    """The plan with the best alignment score that keeps every limit; boundaries, sides and embeddings are searched."""

    type: Literal["budget"] = "budget"
    max_flops_share: float | None = Field(default=None, gt=0, le=1)
    """FLOPs per token as a share of training everything."""
    max_memory_gib: float | None = Field(default=None, gt=0)
    """Predicted memory of one worker."""
    max_worker_hours: float | None = Field(default=None, gt=0)
    """Predicted hours times workers (GPU-hours) for `train.max_steps`."""
    freeze: Literal["deep", "shallow", "either"] = "either"
    """Which side of a boundary may freeze."""
    train_final_norm: bool = False
    """Train the norm after the last decoder layer."""

    @model_validator(mode="after")
    def _some_limit(self) -> BudgetPlanConfig:
        if self.max_flops_share is None and self.max_memory_gib is None and self.max_worker_hours is None:
            raise ValueError("give at least one of max_flops_share, max_memory_gib and max_worker_hours")
        return self


class ChangeOptions(StrictModel):
    """What happens at a change of plan during training."""

    optimizer_state: Literal["drop", "keep"] = "drop"
    """What a parameter that freezes leaves behind: nothing, or its moments for when it thaws."""
    rewarm_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises again after a change; 0 leaves the schedule as it is."""


_FixedPlanConfig = (
    FullPlanConfig
    | FreezeDeepPlanConfig
    | FreezeShallowPlanConfig
    | FromProfilePlanConfig
    | SemanticPlanConfig
    | ExplicitPlanConfig
    | TopKSensitivityPlanConfig
    | RandomPlanConfig
    | SpreadPlanConfig
    | ReversePlanConfig
    | MidpointPlanConfig
    | StitchedPlanConfig
    | MeasuredPlanConfig
    | RecommendedPlanConfig
)
FixedPlanConfig = Annotated[_FixedPlanConfig, Field(discriminator="type")]


class PhaseConfig(StrictModel):
    """One plan of a schedule."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps it lasts; only the last phase may leave it out, and then lasts to the end."""
    plan: FixedPlanConfig
    """What trains meanwhile."""


class SchedulePlanConfig(ChangeOptions):
    """Plans one after the other."""

    type: Literal["schedule"] = "schedule"
    phases: list[PhaseConfig] = Field(min_length=1)
    """The plans in order."""

    @model_validator(mode="after")
    def _only_the_last_is_open(self) -> SchedulePlanConfig:
        for index, phase in enumerate(self.phases[:-1]):
            if phase.steps is None:
                raise ValueError(f"phases.{index}.steps is missing; only the last phase may leave it out")
        return self


class RotationPlanConfig(ChangeOptions, PlanOptions):
    """k layers drawn anew every few steps, as in LISA; embeddings, norm and head keep their state throughout."""

    type: Literal["rotation"] = "rotation"
    k: int = Field(ge=1)
    """Layers that train at a time."""
    period_steps: int = Field(ge=1)
    """Steps between draws."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""


class SampleBudgetPlanConfig(ChangeOptions, PlanOptions):
    """SALF's budgets: every start layer e gets a number of rows, whose steps train layers [e, L); e rises over the run."""

    type: Literal["sample_budget"] = "sample_budget"
    budget: Literal["half", "geometric", "arithmetic"] = "arithmetic"
    """How the number of rows grows with the start layer."""
    filling: Literal["depth_first", "breadth_first"] = "depth_first"
    """The order rows are handed out in."""


PlanConfig = Annotated[
    _FixedPlanConfig
    | BudgetPlanConfig
    | SchedulePlanConfig
    | RotationPlanConfig
    | SampleBudgetPlanConfig
    | FilePlanConfig,
    Field(discriminator="type"),
]
