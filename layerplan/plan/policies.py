"""A plan config to a freeze plan: each policy is a pure choice of layers and a sentence that says why."""

from __future__ import annotations

import random
from typing import Any, Literal

from layerplan.config.plan import (
    ExplicitPlanConfig,
    FreezeDeepPlanConfig,
    FreezeShallowPlanConfig,
    FromProfilePlanConfig,
    FullPlanConfig,
    LayerPlanOptions,
    MeasuredPlanConfig,
    MidpointPlanConfig,
    PlanConfig,
    PlanOptions,
    RandomPlanConfig,
    RecommendedPlanConfig,
    ReversePlanConfig,
    SemanticPlanConfig,
    SpreadPlanConfig,
    TopKSensitivityPlanConfig,
)
from layerplan.errors import PlanError
from layerplan.plan.boundary import check_boundary, compute_boundary
from layerplan.plan.boundary_choice import BoundaryChoice, choose_boundary, explain_choice
from layerplan.plan.cost import predict_cost
from layerplan.plan.freeze_plan import FreezePlan, Modules, Tied
from layerplan.plan.layer_measurement import LayerMeasurements
from layerplan.plan.layer_profile import LayerProfile, ModelIdentity
from layerplan.plan.measured import choose_measured, choose_measured_modules
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.modules import choose_modules
from layerplan.plan.plan_cost import PredictedCost
from layerplan.plan.recommended import recommend
from layerplan.plan.selectors import select, space_layers

DEFAULT_SEQ_LEN = 4096
"""Row length the cost is predicted at when no run gives one."""


def needs_profile(config: PlanConfig) -> bool:
    """Whether the policy reads a measurement."""
    if isinstance(config, ExplicitPlanConfig):
        return any(str(selector).startswith("top:") for selector in config.trainable)
    return isinstance(
        config, FromProfilePlanConfig | SemanticPlanConfig | TopKSensitivityPlanConfig | ReversePlanConfig
    )


def make_plan(
    config: PlanConfig,
    *,
    model: ModelIdentity,
    shape: ModelShape,
    profile: LayerProfile | None = None,
    seq_len: int = DEFAULT_SEQ_LEN,
    measurements: LayerMeasurements | None = None,
) -> FreezePlan:
    """Makes the sealed plan with its evidence and predicted cost.

    Args:
        config: The policy and its options.
        model: The model the plan is for.
        shape: Its sizes.
        profile: What was measured, for policies that read it.
        seq_len: Tokens in a row of the run, on which the cost depends.
        measurements: What the tracer's rivals measured, for policies named after them.

    Raises:
        PlanError: When the policy needs a profile there is none of, the profile is of another model, a selector or
            boundary does not fit, the measurement supports no boundary and that is an error, or the embedding choices
            contradict each other.
    """
    if profile is not None and profile.model.num_layers != model.num_layers:
        raise PlanError(
            f"layer profile {profile.sha256[:12]}: has {profile.model.num_layers} layers, the model {model.num_layers}"
        )
    if isinstance(config, RecommendedPlanConfig):
        return _plan_recommended(config, model, shape, seq_len)
    if isinstance(config, MeasuredPlanConfig):
        return _plan_measured(config, model, shape, measurements, seq_len)
    layers, reason, evidence = _choose(config, shape, profile)
    layers, modules, reason = _choose_modules(config, layers, shape, reason)
    if profile is not None:
        evidence = {"profile_sha256": profile.sha256, **evidence}
    plan = FreezePlan(
        model=model,
        plan_type=config.type,
        trainable_layers=layers,
        trainable_modules=modules,
        reason=reason,
        evidence=evidence,
        **decide_ends(_with_selected_ends(config, shape, profile), shape),
    )
    return seal_with_cost(plan, shape, seq_len)


def check_options(config: PlanConfig, shape: ModelShape) -> None:
    """Refuses what of a plan that waits for a measurement does not fit the model, whatever will be measured.

    Raises:
        PlanError: When its k, its modules, its selectors or its choices about the embeddings do not.
    """
    num_layers = shape.num_layers
    if isinstance(config, TopKSensitivityPlanConfig):
        _check_k(config.k, num_layers - 1)
    if isinstance(config, MeasuredPlanConfig) and config.k is not None:
        _check_k(config.k, num_layers)
    if isinstance(config, ExplicitPlanConfig):
        plain = [each for each in config.trainable if not str(each).strip().startswith("top:")]
        config = config.model_copy(update={"trainable": plain})
    if isinstance(config, LayerPlanOptions) and config.modules is not None:
        choose_modules(config.modules, range(num_layers), shape)
    decide_ends(_with_selected_ends(config, shape, None), shape)


def _plan_recommended(
    config: RecommendedPlanConfig, model: ModelIdentity, shape: ModelShape, seq_len: int
) -> FreezePlan:
    full = make_full_plan(model, shape)
    full_flops = predict_cost(full, shape, seq_len=seq_len).total_flops

    def make(layers: tuple[int, ...] | None) -> FreezePlan:
        if layers is None:
            return full
        return FreezePlan(
            model=model, plan_type=config.type, trainable_layers=layers, reason="", **decide_ends(PlanOptions(), shape)
        )

    found = recommend(
        config,
        shape.num_layers,
        lambda layers: predict_cost(make(layers), shape, seq_len=seq_len).total_flops / full_flops,
    )
    plan = make(found.layers).model_copy(update={"reason": found.reason, "evidence": found.evidence})
    return seal_with_cost(plan, shape, seq_len)


def _plan_measured(
    config: MeasuredPlanConfig,
    model: ModelIdentity,
    shape: ModelShape,
    measurements: LayerMeasurements | None,
    seq_len: int,
) -> FreezePlan:
    if measurements is None:
        raise PlanError(f"plan.type={config.type}: needs layer measurements; measure the model with layerplan measure")
    found = measurements.model
    if (found.num_layers, found.model_type) != (model.num_layers, model.model_type):
        raise PlanError(
            f"layer measurements {measurements.sha256[:12]}: of a {found.model_type} with {found.num_layers} layers, the"
            f" model is a {model.model_type} with {model.num_layers}"
        )
    ends = decide_ends(config, shape)

    def make(layers: tuple[int, ...], modules: Modules, reason: str, evidence: dict[str, Any]) -> FreezePlan:
        return FreezePlan(
            model=model,
            plan_type=config.type,
            trainable_layers=layers,
            trainable_modules=modules,
            reason=reason,
            evidence=evidence,
            **ends,
        )

    full = predict_cost(make_full_plan(model, shape), shape, seq_len=seq_len).total_flops

    def price(layers: tuple[int, ...], modules: Modules) -> float:
        if not layers:
            return 0.0
        return predict_cost(make(layers, modules, "", {}), shape, seq_len=seq_len).total_flops / full

    def restrict(layers: tuple[int, ...]) -> tuple[tuple[int, ...], Modules]:
        return (layers, {}) if config.modules is None else choose_modules(config.modules, layers, shape)

    measurement = measurements.find(config.type)
    if config.unit == "module":
        plan = make(*choose_measured_modules(config, measurement, shape, price))
        return seal_with_cost(plan, shape, seq_len)
    chosen, reason, evidence = choose_measured(config, measurement, lambda layers: price(*restrict(layers)))
    layers, modules, reason = _choose_modules(config, chosen, shape, reason)
    return seal_with_cost(make(layers, modules, reason, evidence), shape, seq_len)


def _choose_modules(
    config: PlanConfig, layers: tuple[int, ...], shape: ModelShape, reason: str
) -> tuple[tuple[int, ...], Modules, str]:
    """The layers of which something trains, the modules of those that train in part, and the reason with both."""
    if not isinstance(config, LayerPlanOptions) or config.modules is None:
        return layers, {}, reason
    chosen, modules = choose_modules(config.modules, layers, shape)
    if not chosen:
        raise PlanError(
            f"plan.modules: none of layers {', '.join(map(str, layers))} has a module that"
            f" {', '.join(config.modules)} names"
        )
    return chosen, modules, f"{reason} Of them only these modules train: {', '.join(config.modules)}."


def seal_with_cost(plan: FreezePlan, shape: ModelShape, seq_len: int) -> FreezePlan:
    """The plan with its predicted cost beside that of training everything, for rows of `seq_len` tokens, sealed."""
    return plan.model_copy(update={"predicted_cost": predict_beside_full(plan, shape, seq_len)}).sealed()


def predict_beside_full(plan: FreezePlan, shape: ModelShape, seq_len: int) -> PredictedCost:
    """Cost of the plan and of training everything, for rows of `seq_len` tokens."""
    return PredictedCost(
        seq_len=seq_len,
        plan=predict_cost(plan, shape, seq_len=seq_len),
        full=predict_cost(make_full_plan(plan.model, shape), shape, seq_len=seq_len),
    )


def make_full_plan(model: ModelIdentity, shape: ModelShape) -> FreezePlan:
    """The plan that trains everything."""
    return FreezePlan(
        model=model,
        plan_type="full",
        trainable_layers=tuple(range(model.num_layers)),
        train_embeddings=True,
        train_final_norm=True,
        train_lm_head=True,
        tied="trained" if shape.is_tied else "untied",
        reason="Every parameter trains.",
    ).sealed()


def decide_ends(config: PlanConfig | PlanOptions, shape: ModelShape) -> dict[str, Any]:
    """Embeddings, norm and head; a tied matrix needs one choice for both of its sides."""
    if isinstance(config, FullPlanConfig):
        tied: Tied = "trained" if shape.is_tied else "untied"
        return {"train_embeddings": True, "train_final_norm": True, "train_lm_head": True, "tied": tied}
    if not isinstance(config, PlanOptions):
        raise PlanError(f"plan.type={config.type}: a plan file carries its own choices")
    norm = {"train_final_norm": config.train_final_norm}
    if not shape.is_tied:
        if config.tied is not None:
            raise PlanError(
                f"plan.tied={config.tied}: the model's embeddings are not tied; use train_embeddings and train_lm_head"
            )
        return norm | {
            "train_embeddings": config.train_embeddings,
            "train_lm_head": config.train_lm_head,
            "tied": "untied",
        }
    if config.tied is None and config.train_embeddings != config.train_lm_head:
        raise PlanError(
            f"plan.train_embeddings={config.train_embeddings} and plan.train_lm_head={config.train_lm_head} contradict each"
            " other: they are one tied matrix; set plan.tied to frozen, trained or head_only"
        )
    choice = config.tied or ("trained" if config.train_embeddings else "frozen")
    if choice == "frozen" and (config.train_embeddings or config.train_lm_head):
        raise PlanError("plan.tied=frozen contradicts plan.train_embeddings or plan.train_lm_head")
    return norm | {
        "train_embeddings": choice == "trained",
        "train_lm_head": choice in ("trained", "head_only"),
        "tied": choice,
    }


def _with_selected_ends(config: PlanConfig, shape: ModelShape, profile: LayerProfile | None) -> PlanConfig:
    """An explicit plan's selectors may name embeddings, final norm and head; the options then say so too."""
    if not isinstance(config, ExplicitPlanConfig):
        return config
    ends = select(config.trainable, shape, profile).ends
    return config.model_copy(update={f"train_{end}": True for end in ends})


def _choose(
    config: PlanConfig, shape: ModelShape, profile: LayerProfile | None
) -> tuple[tuple[int, ...], str, dict[str, Any]]:
    num_layers = shape.num_layers
    match config:
        case FullPlanConfig():
            return tuple(range(num_layers)), "Every parameter trains.", {}
        case FreezeDeepPlanConfig() | FreezeShallowPlanConfig():
            return _cut_by_config(config, num_layers)
        case MidpointPlanConfig():
            boundary = check_boundary(num_layers // 2, num_layers)
            return (
                _one_side(boundary, num_layers, config.freeze),
                f"Boundary {boundary}: the middle, without a measurement.",
                {},
            )
        case ExplicitPlanConfig():
            layers = select(config.trainable, shape, profile).layers
            return layers, f"Layers named by {', '.join(map(str, config.trainable))}.", {}
        case RandomPlanConfig():
            layers = tuple(sorted(random.Random(config.seed).sample(range(num_layers), _check_k(config.k, num_layers))))
            return layers, f"{config.k} layers drawn with seed {config.seed}: a control of equal cost.", {}
        case SpreadPlanConfig():
            layers = space_layers(_check_k(config.k, num_layers), num_layers)
            return layers, f"{config.k} layers evenly spaced, without a measurement.", {}
    return _choose_by_profile(config, shape, _require(profile, config.type))


def _choose_by_profile(
    config: PlanConfig, shape: ModelShape, profile: LayerProfile
) -> tuple[tuple[int, ...], str, dict[str, Any]]:
    num_layers = shape.num_layers
    match config:
        case FromProfilePlanConfig():
            choice = choose_boundary(profile, config)
            reason = f"{explain_choice(choice)}; the {config.freeze} side freezes."
            return _one_side(choice.boundary, num_layers, config.freeze), reason, name_evidence(choice)
        case ReversePlanConfig():
            choice = choose_boundary(profile, config)
            count = choice.boundary
            reason = f"The {count} deepest layers: as many as from_profile trains, from the other end."
            return tuple(range(num_layers - count, num_layers)), reason, name_evidence(choice)
        case TopKSensitivityPlanConfig():
            layers = select([f"top:{_check_k(config.k, num_layers - 1)}:sensitivity"], shape, profile).layers
            return layers, f"The {config.k} most sensitive layers.", {"layer_sensitivity": profile.layer_sensitivity}
        case SemanticPlanConfig():
            measured = profile.semantic.get(config.deviation)
            if measured is None and config.deviation in profile.head_row_semantic:
                raise PlanError(
                    f"plan.deviation={config.deviation}: the layer profile is of layout {profile.schema_version}, which took it"
                    " from the head's rows and not from the labels' semantic bases (SALF, Algorithm 1); trace the model again,"
                    " or set plan.deviation: cosine"
                )
            if measured is None:
                raise PlanError(f"plan.deviation={config.deviation}: the layer profile has no such deviation")
            reason = f"The largest semantic gain ({config.deviation}) is at layer {measured.eof_layer}; layers below it freeze."
            return tuple(range(measured.eof_layer, num_layers)), reason, {"gain": measured.gain}
    raise PlanError(f"plan.type={config.type}: is not made by a policy")


def name_evidence(choice: BoundaryChoice) -> dict[str, Any]:
    """What a plan keeps of a choice."""
    return {"boundary": choice.model_dump(mode="json")}


def _cut_by_config(
    config: FreezeDeepPlanConfig | FreezeShallowPlanConfig, num_layers: int
) -> tuple[tuple[int, ...], str, dict[str, Any]]:
    if config.boundary is not None:
        boundary = check_boundary(config.boundary, num_layers)
    else:
        assert config.split_ratio is not None, "the config gives one of the two"
        boundary = compute_boundary(config.split_ratio, num_layers)
    side: Literal["deep", "shallow"] = "deep" if isinstance(config, FreezeDeepPlanConfig) else "shallow"
    return _one_side(boundary, num_layers, side), f"Boundary {boundary} as configured; the {side} side freezes.", {}


def _one_side(boundary: int, num_layers: int, freeze: Literal["deep", "shallow"]) -> tuple[int, ...]:
    return tuple(range(boundary)) if freeze == "deep" else tuple(range(boundary, num_layers))


def _check_k(k: int, largest: int) -> int:
    if k > largest:
        raise PlanError(f"plan.k={k}: must lie in 1..{largest}")
    return k


def _require(profile: LayerProfile | None, plan_type: str) -> LayerProfile:
    if profile is None:
        raise PlanError(f"plan.type={plan_type}: needs a layer profile; trace the model first")
    return profile
