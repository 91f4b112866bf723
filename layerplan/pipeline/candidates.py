"""The trials of a sweep with their plans, from config and sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layerplan.config.plan import (
    FreezeDeepPlanConfig,
    FreezeShallowPlanConfig,
    PlanConfig,
    PlanOptions,
    SpreadPlanConfig,
)
from layerplan.config.run import RunConfig
from layerplan.config.sweep import SweepConfig
from layerplan.errors import ConfigError, PlanError
from layerplan.plan.boundary import check_boundary, compute_boundary
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.plan_cost import PredictedCost
from layerplan.plan.policies import make_plan
from layerplan.sweep.schedule import compute_flops, count_steps
from layerplan.sweep.space import OwnValues, Point, list_points

DEFAULT_SWEEP = SweepConfig(split_ratios=[1 / 3, 1 / 2, 2 / 3])


@dataclass(frozen=True)
class Candidate:
    """A trial of the space, the plan it would train, and for how long."""

    point: Point
    plan: FreezePlan
    cost: PredictedCost
    """Of the plan, for the run's rows."""
    steps: int
    flops: float
    """Predicted, in all."""


def make_candidates(config: RunConfig, sweep: SweepConfig, model: ModelIdentity, shape: ModelShape) -> list[Candidate]:
    """Every trial of the space with its plan, in the space's order.

    Raises:
        ConfigError: When a boundary does not fit the model, or a choice of ends does not.
    """
    boundaries = list_boundaries(sweep, shape.num_layers)
    tokens = config.train.global_batch_size * config.corpus.seq_len
    modules = getattr(config.plan, "modules", None)
    found = []
    for point in list_points(sweep, boundaries, find_own_values(config)):
        ends = point.ends.model_dump(include=set(PlanOptions.model_fields))
        try:
            chosen = choose_plan(point, shape.num_layers, modules=modules, **ends)
            plan = make_plan(chosen, model=model, shape=shape, seq_len=config.corpus.seq_len)
        except PlanError as error:
            where = "plan" if sweep.ends is None or "plan.modules" in str(error) else "sweep.ends"
            raise ConfigError(str(error).replace("plan.", f"{where}.")) from None
        cost = plan.predicted_cost
        assert cost is not None, "a plan is priced when it is made"
        steps = count_steps(sweep, cost, tokens)
        found.append(Candidate(point, plan, cost, steps, compute_flops(cost, steps, tokens)))
    return found


def choose_plan(point: Point, num_layers: int, **options: Any) -> PlanConfig:
    """What a trial's plan would be called in a config."""
    if point.freeze == "spread":
        return SpreadPlanConfig(k=num_layers - point.boundary, **options)
    kind = FreezeDeepPlanConfig if point.freeze == "deep" else FreezeShallowPlanConfig
    return kind(boundary=point.boundary, **options)


def list_boundaries(sweep: SweepConfig, num_layers: int) -> Sequence[int]:
    """The distinct boundaries a sweep names, in order; raises `ConfigError` for one that the model does not have."""
    ratios, given = sweep.split_ratios or [], sweep.boundaries or []
    try:
        for boundary in given:
            check_boundary(boundary, num_layers, "sweep.boundaries")
        return sorted({*(compute_boundary(ratio, num_layers) for ratio in ratios), *given})
    except PlanError as error:
        raise ConfigError(str(error)) from None


def find_own_values(config: RunConfig) -> OwnValues:
    """What the config says without its sweep; ends that its plan says nothing of are frozen."""
    told = {name: getattr(config.plan, name) for name in PlanOptions.model_fields if hasattr(config.plan, name)}
    return OwnValues(PlanOptions(**told), config.train.optimizer.learning_rate, config.seed)
