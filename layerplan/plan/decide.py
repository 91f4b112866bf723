"""From a plan config of any kind to the sealed plan: read from a file, made by a policy, searched, or put in phases."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerplan.config.measure import Measurement
from layerplan.config.plan import (
    BudgetPlanConfig,
    ExplicitPlanConfig,
    FilePlanConfig,
    FreezeShallowPlanConfig,
    MeasuredPlanConfig,
    PlanConfig,
    PlanOptions,
    RotationPlanConfig,
    SampleBudgetPlanConfig,
    SchedulePlanConfig,
    StitchedPlanConfig,
)
from layerplan.config.train import TrainConfig
from layerplan.errors import PlanError
from layerplan.plan.budget import search_budget
from layerplan.plan.explain import name_ranges
from layerplan.plan.freeze_plan import FreezePlan, Modules, PlanPhase, Tied
from layerplan.plan.layer_measurement import LayerMeasurements
from layerplan.plan.layer_profile import LayerProfile, ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import check_options, make_plan, needs_profile, seal_with_cost
from layerplan.plan.sample_budget import allocate_start_layers
from layerplan.plan.stitch_report import LayerOrigin, list_layers
from layerplan.run_folder import STITCH_NAME

TRAINED_TEXT = {
    "new": "The layers that were added train, those of the donors freeze",
    "donor": "The layers of the donors train, those that were added freeze",
}


@dataclass(frozen=True)
class PlanContext:
    """What a decision may depend on beside its config."""

    model: ModelIdentity
    shape: ModelShape
    train: TrainConfig
    seq_len: int
    profile: LayerProfile | None = None
    origins: tuple[LayerOrigin, ...] | None = None
    """Where the layers of a stitched model come from."""
    measurements: LayerMeasurements | None = None
    is_identified: bool = True
    """False for a model that is not made or not at hand yet: of its identity only depth and type are known."""


def resolve_plan(config: PlanConfig, context: PlanContext) -> FreezePlan:
    """Makes or reads the sealed plan.

    Raises:
        PlanError: When the config asks for what the model, the profile or the limits do not give; see `make_plan`.
    """
    match config:
        case FilePlanConfig():
            return _read_plan(Path(config.path).expanduser(), context)
        case BudgetPlanConfig():
            if context.profile is None:
                raise PlanError("plan.type=budget: needs a layer profile; trace the model first")
            return search_budget(
                config, context.model, context.shape, context.profile, train=context.train, seq_len=context.seq_len
            )
        case SchedulePlanConfig():
            return _put_in_order(config, context)
        case RotationPlanConfig():
            return _rotate(config, context)
        case SampleBudgetPlanConfig():
            return _follow_budget(config, context)
    return _plan_of(config, context)


def check_plan(config: PlanConfig, context: PlanContext) -> None:
    """Refuses what no measurement could make a plan of, before there is one: a file, a boundary, a k, a module.

    Args:
        config: The plan's config.
        context: What is known; neither profile nor measurements.

    Raises:
        PlanError: As `resolve_plan` would.
    """
    if isinstance(config, SchedulePlanConfig):
        _list_starts(config, context.train.max_steps)
        for phase in config.phases:
            check_plan(phase.plan, context)
    elif not wants_profile(config) and not list_measurements(config):
        resolve_plan(config, context)
    elif not isinstance(config, BudgetPlanConfig):
        check_options(config, context.shape)


def _read_plan(path: Path, context: PlanContext) -> FreezePlan:
    plan = FreezePlan.load(path)
    if context.is_identified:
        plan.check_model(context.model)
    else:
        plan.check_kind(context.model)
    check_planned_steps(plan, context.train.max_steps, path)
    return plan


def check_planned_steps(plan: FreezePlan, max_steps: int, path: Path) -> None:
    """Refuses a plan whose phases were made for another number of steps: what trains after them was never decided.

    Raises:
        PlanError: Naming both numbers.
    """
    if plan.phases and plan.planned_steps != max_steps:
        raise PlanError(
            f"plan.path={path}: its phases were made for {plan.planned_steps} steps, but train.max_steps={max_steps}"
        )


def wants_profile(config: PlanConfig) -> bool:
    """Whether the decision reads a measurement."""
    if isinstance(config, SchedulePlanConfig):
        return any(needs_profile(phase.plan) for phase in config.phases)
    return isinstance(config, BudgetPlanConfig) or needs_profile(config)


def list_measurements(config: PlanConfig) -> list[Measurement]:
    """Rival measurements that the decision reads, each once."""
    plans = [phase.plan for phase in config.phases] if isinstance(config, SchedulePlanConfig) else [config]
    return list(dict.fromkeys(plan.type for plan in plans if isinstance(plan, MeasuredPlanConfig)))


def join_phases(
    config: SchedulePlanConfig | RotationPlanConfig | SampleBudgetPlanConfig,
    phases: Sequence[tuple[int, FreezePlan]],
    context: PlanContext,
    reason: str,
) -> FreezePlan:
    """One plan from (start step, plan) pairs; what trains in any phase counts as trained.

    Raises:
        PlanError: When phases treat tied embeddings in ways that cannot follow each other.
    """
    plans = [plan for _, plan in phases]
    ties = {plan.tied for plan in plans}
    if "head_only" in ties and "trained" in ties:
        raise PlanError("plan.phases: tied=head_only and tied=trained cannot follow each other in one run")
    strongest: tuple[Tied, ...] = ("trained", "head_only", "untied", "frozen")
    tied = next(choice for choice in strongest if choice in ties)
    joined = FreezePlan(
        model=context.model,
        plan_type=config.type,
        trainable_layers=tuple(sorted({layer for plan in plans for layer in plan.trainable_layers})),
        trainable_modules=_join_modules(plans),
        train_embeddings=any(plan.train_embeddings for plan in plans),
        train_final_norm=any(plan.train_final_norm for plan in plans),
        train_lm_head=any(plan.train_lm_head for plan in plans),
        tied=tied,
        reason=reason,
        phases=tuple(
            PlanPhase(start_step=start, **plan.model_dump(include=set(PlanPhase.model_fields) - {"start_step"}))
            for start, plan in phases
        ),
        planned_steps=context.train.max_steps,
        optimizer_state=config.optimizer_state,
        rewarm_steps=config.rewarm_steps,
        evidence={} if context.profile is None else {"profile_sha256": context.profile.sha256},
    )
    return seal_with_cost(joined, context.shape, context.seq_len)


def _join_modules(plans: Sequence[FreezePlan]) -> Modules:
    """Modules that train in some plan, of layers that train whole in none."""
    whole = {layer for plan in plans for layer in plan.trainable_layers if layer not in plan.trainable_modules}
    names: dict[int, set[str]] = {}
    for plan in plans:
        for layer, modules in plan.trainable_modules.items():
            names.setdefault(layer, set()).update(modules)
    return {layer: tuple(sorted(each)) for layer, each in sorted(names.items()) if layer not in whole}


def _put_in_order(config: SchedulePlanConfig, context: PlanContext) -> FreezePlan:
    starts = _list_starts(config, context.train.max_steps)
    plans = [_plan_of(phase.plan, context) for phase in config.phases]
    phases = list(zip(starts, plans, strict=True))
    names = ", ".join(f"{plan.plan_type} from step {first}" for first, plan in phases)
    return join_phases(config, phases, context, f"{len(phases)} plans in order: {names}.")


def _list_starts(config: SchedulePlanConfig, max_steps: int) -> list[int]:
    """First step of each phase; together they must last as long as the run."""
    starts: list[int] = []
    start = 0
    for phase in config.phases:
        if start >= max_steps:
            raise PlanError(
                f"plan.phases: phase {len(starts)} would start at step {start}, but train.max_steps={max_steps}"
            )
        starts.append(start)
        start += phase.steps or max_steps
    if start < max_steps:
        raise PlanError(f"plan.phases: end at step {start}, before train.max_steps={max_steps}")
    return starts


def _rotate(config: RotationPlanConfig, context: PlanContext) -> FreezePlan:
    num_layers = context.shape.num_layers
    if config.k > num_layers:
        raise PlanError(f"plan.k={config.k}: must lie in 1..{num_layers}")
    rng = random.Random(config.seed)
    phases = []
    for start in range(0, context.train.max_steps, config.period_steps):
        layers = sorted(rng.sample(range(num_layers), config.k))
        phases.append((start, _plan_of(ExplicitPlanConfig(trainable=[*layers], **_options(config)), context)))
    reason = f"{config.k} layers drawn every {config.period_steps} steps with seed {config.seed}."
    return join_phases(config, phases, context, reason)


def _follow_budget(config: SampleBudgetPlanConfig, context: PlanContext) -> FreezePlan:
    """Rows become steps: the phase of start layer e begins with the step that reads its first row."""
    train = context.train
    rows = train.max_steps * train.global_batch_size
    counts = allocate_start_layers(rows, context.shape.num_layers, config.budget, config.filling)
    phases: list[tuple[int, FreezePlan]] = []
    first_row = 0
    for layer, count in enumerate(counts):
        start = -(-first_row // train.global_batch_size)
        first_row += count
        if count == 0 or start >= -(-first_row // train.global_batch_size):
            continue  # no step of its own: the layer's few rows go with their neighbours
        options = _options(config)
        if layer == 0:
            config_of_layer: PlanConfig = ExplicitPlanConfig(trainable=["0:"], **options)
        else:
            config_of_layer = FreezeShallowPlanConfig(boundary=layer, **options)
        phases.append((start, _plan_of(config_of_layer, context)))
    reason = f"{config.budget} budget, {config.filling}: {len(phases)} start layers over {train.max_steps} steps."
    return join_phases(config, phases, context, reason)


def _plan_of(config: PlanConfig, context: PlanContext) -> FreezePlan:
    if isinstance(config, StitchedPlanConfig):
        return _follow_origins(config, context)
    return make_plan(
        config,
        model=context.model,
        shape=context.shape,
        profile=context.profile,
        seq_len=context.seq_len,
        measurements=context.measurements,
    )


def _follow_origins(config: StitchedPlanConfig, context: PlanContext) -> FreezePlan:
    """An explicit choice of layers, by where they come from."""
    if context.origins is None:
        raise PlanError(
            f"plan.type=stitched: {context.model.name} has no {STITCH_NAME}, which says where layers come from; use it with"
            " model.type: stitched, or a folder that such a run made"
        )
    layers = list_layers(context.origins, config.train)
    if not layers:
        raise PlanError(
            f"plan.train={config.train}: none of the model's {context.model.num_layers} layers is such a one"
        )
    chosen = ExplicitPlanConfig(trainable=[*layers], **_options(config))
    plan = make_plan(chosen, model=context.model, shape=context.shape, profile=context.profile, seq_len=context.seq_len)
    reason = f"{TRAINED_TEXT[config.train]} ({name_ranges(layers)} of {context.model.num_layers})."
    return plan.model_copy(update={"plan_type": config.type, "reason": reason}).sealed()


def _options(config: PlanOptions) -> dict[str, Any]:
    return {name: getattr(config, name) for name in PlanOptions.model_fields}
