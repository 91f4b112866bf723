"""The best plan under limits: boundaries, sides and embeddings are searched with the cost model and the profile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerplan.config.plan import (
    BoundaryOptions,
    BudgetPlanConfig,
    FreezeDeepPlanConfig,
    FreezeShallowPlanConfig,
    PlanConfig,
)
from layerplan.config.train import TrainConfig
from layerplan.errors import PlanError
from layerplan.plan.attention import expect_attention
from layerplan.plan.boundary import compute_alignment_scores, list_candidates, rate_boundaries
from layerplan.plan.boundary_choice import (
    DEFAULT_PAIR,
    check_min_side,
    choose_boundary,
    find_sensitivity,
    get_sensitivity,
)
from layerplan.plan.cost import ASSUMED_FLOPS_PER_S, GIB, predict_cost
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.holm import correct_holm
from layerplan.plan.layer_profile import LayerProfile, ModelIdentity
from layerplan.plan.memory import MemoryEstimate, choose_placement
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.permutation import SIGNIFICANT, compare_with_other_orders
from layerplan.plan.placement import Placement
from layerplan.plan.policies import make_full_plan, make_plan, name_evidence

SIGNS = {"deep": 1.0, "shallow": -1.0}
"""What S counts for the side that freezes."""


@dataclass(frozen=True)
class Candidate:
    """One plan of the search, with what decides."""

    side: str
    """`freeze_deep` or `freeze_shallow`."""
    boundary: int
    ends: str
    """What trains beside the layers: `none`, `tied`, `head`, or `embeddings and head`."""
    score: float | None
    """The rule's form of S(boundary) (Eq. 7), its sign turned for freeze_shallow; None where the rule has none."""
    trainable_params: int
    flops_share: float
    """Of training everything."""
    memory_gib: float
    """Predicted for one worker under the leanest placement the config allows."""
    worker_hours: float
    """Hours times workers for the whole run."""
    fits: bool
    """Whether it keeps every limit."""


def search_budget(
    config: BudgetPlanConfig,
    model: ModelIdentity,
    shape: ModelShape,
    profile: LayerProfile,
    *,
    train: TrainConfig,
    seq_len: int,
) -> FreezePlan:
    """Returns the best plan within the limits, its Pareto table in the evidence.

    The score of a boundary says which side should freeze, so the same boundary counts with the other sign for the
    other side. Among plans of equal score the cheapest wins: what trains beside the layers does not change the score.

    Raises:
        PlanError: When no plan keeps the limits; the message names the cheapest.
    """
    check_min_side(config.min_side, shape.num_layers)
    pairs = list(_list_candidates(config, model, shape, profile, train=train, seq_len=seq_len))
    candidates = [candidate for candidate, _ in pairs]
    fitting = [pair for pair in pairs if pair[0].fits]
    if not fitting:
        raise PlanError(_explain_no_fit(config, candidates))
    p_values = measure_sides(config, profile)
    ranked, why = _rank(config, shape.num_layers, p_values, [candidate for candidate, _ in fitting])
    best, best_config = next(pair for pair in fitting if pair[0] == ranked)
    plan = make_plan(best_config, model=model, shape=shape, profile=profile, seq_len=seq_len)
    reason = (
        f"{best.side} at boundary {best.boundary} {why} of {len(fitting)} plans within {_name_limits(config)}:"
        f" {best.flops_share:.1%} of the FLOPs of full training, {best.memory_gib:.2f} GiB."
    )
    evidence = {
        **plan.evidence,
        "limits": config.model_dump(exclude={"type", *BoundaryOptions.model_fields}, exclude_none=True),
        **name_evidence(choose_boundary(profile, BoundaryOptions(rule=config.rule, min_side=config.min_side))),
        "side_p_values": p_values,
        "pareto": [asdict(item) | {"chosen": item == best} for item in _with_chosen(find_pareto(candidates), best)],
    }
    return plan.model_copy(update={"plan_type": "budget", "reason": reason, "evidence": evidence}).sealed()


def measure_sides(config: BudgetPlanConfig, profile: LayerProfile) -> dict[str, float]:
    """The p of each side that may freeze, by name: freezing shallow asks for the opposite of S.

    Corrected by Holm for the sides, and for the default sensitivity and rule when the options name others.
    """
    sides = [side for side in SIGNS if config.freeze in (side, "either")]
    own = (find_sensitivity(profile), config.rule)
    pairs = list(dict.fromkeys([own, DEFAULT_PAIR]))
    tested = [
        compare_with_other_orders(
            [SIGNS[side] * value for value in profile.task_particle],
            [SIGNS[side] * value for value in get_sensitivity(profile, kind)],
            rule,
            config.min_side,
        )
        for kind, rule in pairs
        for side in sides
    ]
    corrected = correct_holm([item.p_value for item in tested])
    return {f"freeze_{side}": p for side, p in zip(sides, corrected)}


def _rank(
    config: BudgetPlanConfig, num_layers: int, p_values: Mapping[str, float], fitting: Sequence[Candidate]
) -> tuple[Candidate, str]:
    """The plan that wins among those that fit, and by what: its score where a side is supported, else the options say."""
    scored = [item for item in fitting if item.score is not None]
    supported = [item for item in scored if p_values[item.side] < SIGNIFICANT]
    if not supported and config.without_evidence == "error":
        raise PlanError(f"plan.without_evidence=error: {_explain_sides(p_values)}; set midpoint or best")
    pool = supported or (scored if config.without_evidence == "best" else [])
    if pool:
        best = max(pool, key=lambda item: (item.score, -item.flops_share))
        proof = f"p = {p_values[best.side]:.2g}" + ("" if supported else ", no evidence")
        return best, f"has the best score ({best.score:+.3f}, {proof})"
    middle = num_layers // 2
    nearest = min(fitting, key=lambda item: (abs(item.boundary - middle), item.side != "freeze_deep", item.flops_share))
    return nearest, f"is nearest to the middle, because {_explain_sides(p_values)},"


def _explain_sides(p_values: Mapping[str, float]) -> str:
    named = ", ".join(f"{side} p = {p:.2g}" for side, p in p_values.items())
    return f"the measurement supports no boundary within the limits ({named})"


def find_pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Plans no other one beats in score without costing more FLOPs, cheapest first."""
    front: list[Candidate] = []
    best = -math.inf
    scored = [(item.score, item) for item in candidates if item.score is not None]
    for score, item in sorted(scored, key=lambda pair: (pair[1].flops_share, -pair[0])):
        if score > best:
            front.append(item)
            best = score
    return front


def _with_chosen(front: Sequence[Candidate], best: Candidate) -> list[Candidate]:
    """The front and the chosen plan, which a limit on memory or hours may have kept off it."""
    return sorted({*front, best}, key=lambda item: (item.flops_share, item.score or 0.0))


def render_pareto(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Pareto table in Markdown."""
    lines = [
        "| plan | boundary | also trains | score | FLOPs of full | GiB per worker | worker hours | within limits |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row['side']} | {row['boundary']} | {row['ends']} | {_score_label(row)} | {row['flops_share']:.1%}"
            f" | {row['memory_gib']:.2f} | {row['worker_hours']:.3g} | {_fit_label(row)} |"
        )
    return lines


def _score_label(row: Mapping[str, Any]) -> str:
    return "-" if row["score"] is None else f"{row['score']:+.3f}"


def _fit_label(row: Mapping[str, Any]) -> str:
    return "**chosen**" if row["chosen"] else "yes" if row["fits"] else "no"


def _list_candidates(
    config: BudgetPlanConfig,
    model: ModelIdentity,
    shape: ModelShape,
    profile: LayerProfile,
    *,
    train: TrainConfig,
    seq_len: int,
) -> Iterator[tuple[Candidate, PlanConfig]]:
    full = predict_cost(make_full_plan(model, shape), shape, seq_len=seq_len).total_flops
    tokens = train.max_steps * train.global_batch_size * seq_len
    rate = train.peak_tflops * 1e12 * 0.5 if train.peak_tflops else ASSUMED_FLOPS_PER_S[train.use_gpu]
    rated = _rate(config, profile)
    kinds = {"deep": FreezeDeepPlanConfig, "shallow": FreezeShallowPlanConfig}
    for side, kind in kinds.items():
        if config.freeze not in (side, "either"):
            continue
        for boundary in range(1, shape.num_layers):
            for ends, options in _list_ends(shape):
                choice = kind(boundary=boundary, train_final_norm=config.train_final_norm, **options)
                plan = make_plan(choice, model=model, shape=shape, profile=profile, seq_len=seq_len)
                cost = predict_cost(plan, shape, seq_len=seq_len)
                placement, estimate = _predict_placement(plan, shape, config, train, seq_len)
                memory = estimate.total / GIB
                again = placement.count_recomputed(cost.forward_flops, shape.num_layers)
                hours = tokens * (cost.total_flops + again) / rate / 3600
                candidate = Candidate(
                    side=f"freeze_{side}",
                    boundary=boundary,
                    ends=ends,
                    score=SIGNS[side] * rated[boundary] if boundary in rated else None,
                    trainable_params=cost.trainable_params,
                    flops_share=cost.total_flops / full,
                    memory_gib=memory,
                    worker_hours=hours,
                    fits=_keeps(config.max_flops_share, cost.total_flops / full)
                    and _keeps(config.max_memory_gib, memory)
                    and _keeps(config.max_worker_hours, hours),
                )
                yield candidate, choice


def _rate(config: BudgetPlanConfig, profile: LayerProfile) -> dict[int, float]:
    """The rule's form of S by boundary."""
    num_layers = profile.model.num_layers
    scores = compute_alignment_scores(profile.task_particle, get_sensitivity(profile, find_sensitivity(profile)))
    rated = rate_boundaries(scores, num_layers, config.rule, config.min_side)
    return dict(zip(list_candidates(num_layers, config.rule, config.min_side), rated.tolist()))


def _list_ends(shape: ModelShape) -> list[tuple[str, dict[str, Any]]]:
    if shape.is_tied:
        return [("none", {"tied": "frozen"}), ("head", {"tied": "head_only"}), ("tied", {"tied": "trained"})]
    return [
        ("none", {}),
        ("head", {"train_lm_head": True}),
        ("embeddings and head", {"train_embeddings": True, "train_lm_head": True}),
    ]


def _predict_placement(
    plan: FreezePlan, shape: ModelShape, config: BudgetPlanConfig, train: TrainConfig, seq_len: int
) -> tuple[Placement, MemoryEstimate]:
    device_type, train = "cuda" if train.use_gpu else "cpu", train.assume_compile()
    available = config.max_memory_gib * GIB if config.max_memory_gib is not None else float("inf")
    return choose_placement(
        plan,
        shape,
        train,
        seq_len=seq_len,
        world_size=train.fewest_workers,
        device_type=device_type,
        available_bytes=available,
        attention=expect_attention(train, seq_len=seq_len, device_type=device_type),
    )


def _keeps(limit: float | None, value: float) -> bool:
    return limit is None or value <= limit


def _name_limits(config: BudgetPlanConfig) -> str:
    limits = [("max_flops_share", ""), ("max_memory_gib", " GiB"), ("max_worker_hours", " worker hours")]
    return ", ".join(
        f"{name}={getattr(config, name):g}{unit}" for name, unit in limits if getattr(config, name) is not None
    )


def _explain_no_fit(config: BudgetPlanConfig, candidates: Sequence[Candidate]) -> str:
    cheapest = min(candidates, key=lambda item: (item.flops_share, item.memory_gib))
    leanest = min(candidates, key=lambda item: item.memory_gib)
    return (
        f"plan: no plan keeps {_name_limits(config)}; the cheapest is {cheapest.side} at boundary {cheapest.boundary} with"
        f" {cheapest.flops_share:.1%} of the FLOPs, {cheapest.memory_gib:.2f} GiB and {cheapest.worker_hours:.3g} worker"
        f" hours; the leanest needs {leanest.memory_gib:.2f} GiB"
    )
