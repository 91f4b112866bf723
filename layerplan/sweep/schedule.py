"""How long a trial trains: for as many tokens as every other one, or for as many FLOPs."""

from __future__ import annotations

import math

from layerplan.config.sweep import SweepConfig
from layerplan.plan.plan_cost import PredictedCost


def count_steps(sweep: SweepConfig, cost: PredictedCost, tokens_per_step: int) -> int:
    """Optimizer steps of a trial.

    With `equal: flops` they are those whose predicted FLOPs, the optimizer's included, come nearest to `max_steps` steps of
    training everything, and at least one. They depend on the plan alone, so a trial keeps them when the space grows.

    Args:
        sweep: The sweep.
        cost: Of the trial's plan, beside training everything.
        tokens_per_step: Tokens of a global batch.
    """
    if sweep.equal == "tokens":
        return sweep.max_steps
    full = tokens_per_step * cost.full.total_flops + cost.full.optimizer_flops_per_step
    plan = tokens_per_step * cost.plan.total_flops + cost.plan.optimizer_flops_per_step
    return max(1, round(sweep.max_steps * full / plan))


def find_report_spacing(sweep: SweepConfig, steps: int) -> int | None:
    """Steps between reports, so that there is one wherever `asha` judges; None where nobody does."""
    return None if sweep.scheduler == "none" else math.ceil(steps * sweep.grace_share)


def compute_flops(cost: PredictedCost, steps: int, tokens_per_step: int) -> float:
    """Predicted FLOPs of a trial, the optimizer's included."""
    return steps * (tokens_per_step * cost.plan.total_flops + cost.plan.optimizer_flops_per_step)
