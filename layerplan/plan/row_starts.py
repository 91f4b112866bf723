"""From a fine-tuning method to the plan of its layers and the layer each row trains from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from layerplan.config.finetune import FinetuneConfig
from layerplan.config.plan import ExplicitPlanConfig, FreezeDeepPlanConfig, FreezeShallowPlanConfig, PlanConfig
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.sample_budget import allocate_start_layers, assign_start_layers


def choose_plan_config(config: FinetuneConfig) -> PlanConfig:
    """The plan of a method: every layer it may move, with embeddings, final norm and head frozen."""
    if config.method == "freeze_deep":
        return FreezeDeepPlanConfig(split_ratio=config.split_ratio)
    if config.method in ("freeze_shallow", "lora_half"):
        return FreezeShallowPlanConfig(split_ratio=config.split_ratio)
    return ExplicitPlanConfig(trainable=["0:"])


def choose_start_layers(
    config: FinetuneConfig, plan: FreezePlan, num_rows: int, eof_layers: Sequence[int] | None, *, seed: int
) -> list[int]:
    """The start layer of each row.

    `salf` gives the budget's places to rows by their end-of-freezing layers (Algorithm 4), LIFT and LIFT* at random;
    the other methods train every row from the plan's lowest layer.

    Args:
        config: Method and budget.
        plan: The method's plan.
        num_rows: Training rows.
        eof_layers: Of each row, for `salf`.
        seed: Of the draws.
    """
    if not config.has_budget:
        return [min(plan.trainable_layers)] * num_rows
    counts = allocate_start_layers(num_rows, plan.model.num_layers, config.budget, config.filling)
    if config.method == "salf":
        assert eof_layers is not None and len(eof_layers) == num_rows
        return assign_start_layers(eof_layers, counts, seed=seed)
    starts = [layer for layer, count in enumerate(counts) for _ in range(count)]
    random.Random(seed).shuffle(starts)
    return starts


def find_eof_layer(deviations: Sequence[float]) -> int:
    """The layer with the largest gain d(l-1) - d(l), 0-based, the first on a tie (Algorithm 3).

    Args:
        deviations: Of the states 0..L; NaN is no gain.
    """
    gains = [before - after for before, after in pairwise(deviations)]
    return max(range(len(gains)), key=lambda layer: (gains[layer] == gains[layer], gains[layer], -layer))
