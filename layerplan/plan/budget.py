"""The best plan under limits: boundaries, sides and embeddings are searched with the cost model and the profile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerplan.config.plan import BudgetPlanConfig, FreezeDeepPlanConfig, FreezeShallowPlanConfig, PlanConfig
from layerplan.config.train import TrainConfig
from layerplan.errors import PlanError
from layerplan.plan.cost import ASSUMED_FLOPS_PER_S, GIB, predict_cost
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import LayerProfile, ModelIdentity
from layerplan.plan.memory import choose_placement
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_full_plan, make_plan


@dataclass(frozen=True)
class Candidate:
    """One plan of the search, with what decides."""

    side: str
    """`freeze_deep` or `freeze_shallow`."""
    boundary: int
    ends: str
    """What trains beside the layers: `none`, `tied`, `head`, or `embeddings and head`."""
    score: float
    """S(boundary) for freeze_deep, -S(boundary) for freeze_shallow (Eq. 7)."""
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
    pairs = list(_list_candidates(config, model, shape, profile, train=train, seq_len=seq_len))
    candidates = [candidate for candidate, _ in pairs]
    fitting = [pair for pair in pairs if pair[0].fits]
    if not fitting:
        raise PlanError(_explain_no_fit(config, candidates))
    best, best_config = max(fitting, key=lambda pair: (pair[0].score, -pair[0].flops_share))
    plan = make_plan(best_config, model=model, shape=shape, profile=profile)
    reason = (
        f"{best.side} at boundary {best.boundary} has the best score ({best.score:+.3f}) of {len(fitting)} plans within"
        f" {_name_limits(config)}: {best.flops_share:.1%} of the FLOPs of full training, {best.memory_gib:.2f} GiB."
    )
    evidence = {
        **plan.evidence,
        "limits": config.model_dump(exclude={"type"}, exclude_none=True),
        "alignment_score": profile.alignment_score,
        "pareto": [asdict(item) | {"chosen": item == best} for item in _with_chosen(find_pareto(candidates), best)],
    }
    return plan.model_copy(update={"plan_type": "budget", "reason": reason, "evidence": evidence}).sealed()


def find_pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Plans no other one beats in score without costing more FLOPs, cheapest first."""
    front: list[Candidate] = []
    for item in sorted(candidates, key=lambda item: (item.flops_share, -item.score)):
        if not front or item.score > front[-1].score:
            front.append(item)
    return front


def _with_chosen(front: Sequence[Candidate], best: Candidate) -> list[Candidate]:
    """The front and the chosen plan, which a limit on memory or hours may have kept off it."""
    return sorted({*front, best}, key=lambda item: (item.flops_share, item.score))


def render_pareto(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The Pareto table in Markdown."""
    lines = [
        "| plan | boundary | also trains | score | FLOPs of full | GiB per worker | worker hours | within limits |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row['side']} | {row['boundary']} | {row['ends']} | {row['score']:+.3f} | {row['flops_share']:.1%}"
            f" | {row['memory_gib']:.2f} | {row['worker_hours']:.3g} | {_fit_label(row)} |"
        )
    return lines


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
    kinds = {"deep": (FreezeDeepPlanConfig, 1.0), "shallow": (FreezeShallowPlanConfig, -1.0)}
    for side, (kind, sign) in kinds.items():
        if config.freeze not in (side, "either"):
            continue
        for boundary in range(1, shape.num_layers):
            for ends, options in _list_ends(shape):
                choice = kind(boundary=boundary, train_final_norm=config.train_final_norm, **options)
                plan = make_plan(choice, model=model, shape=shape, profile=profile)
                cost = predict_cost(plan, shape, seq_len=seq_len)
                memory = _predict_memory(plan, shape, config, train, seq_len)
                hours = tokens * cost.total_flops / rate / 3600
                candidate = Candidate(
                    side=f"freeze_{side}",
                    boundary=boundary,
                    ends=ends,
                    score=sign * profile.alignment_score[boundary - 1],
                    trainable_params=cost.trainable_params,
                    flops_share=cost.total_flops / full,
                    memory_gib=memory,
                    worker_hours=hours,
                    fits=_keeps(config.max_flops_share, cost.total_flops / full)
                    and _keeps(config.max_memory_gib, memory)
                    and _keeps(config.max_worker_hours, hours),
                )
                yield candidate, choice


def _list_ends(shape: ModelShape) -> list[tuple[str, dict[str, Any]]]:
    if shape.is_tied:
        return [("none", {"tied": "frozen"}), ("head", {"tied": "head_only"}), ("tied", {"tied": "trained"})]
    return [
        ("none", {}),
        ("head", {"train_lm_head": True}),
        ("embeddings and head", {"train_embeddings": True, "train_lm_head": True}),
    ]


def _predict_memory(
    plan: FreezePlan, shape: ModelShape, config: BudgetPlanConfig, train: TrainConfig, seq_len: int
) -> float:
    device_type = "cuda" if train.use_gpu else "cpu"
    available = config.max_memory_gib * GIB if config.max_memory_gib is not None else float("inf")
    _, estimate = choose_placement(
        plan,
        shape,
        train,
        seq_len=seq_len,
        world_size=train.num_workers,
        device_type=device_type,
        available_bytes=available,
    )
    return estimate.total / GIB


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
