"""`train.micro_batch_size: auto` as a number: the largest micro-batch that costs neither recomputation nor communication.

A larger micro-batch reads the weights less often for the same tokens. Beyond some thousand tokens that gains nothing, and
where memory is short one row with everything kept is quicker than several that are recomputed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layerplan.config.train import TrainConfig
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.memory import HEADROOM, choose_placement
from layerplan.plan.model_shape import ModelShape

MOST_TOKENS = {"cuda": 32_768, "cpu": 2_048}
"""Tokens of a forward pass from which on more of them make none faster."""


def list_sizes(config: TrainConfig, *, world_size: int, seq_len: int, device_type: str) -> tuple[int, ...]:
    """Sizes that `auto` may take, ascending: those that divide a worker's rows, and one.

    Of a range of workers some have a row less than others, and a last micro-batch with it.
    """
    rows = -(-config.global_batch_size // world_size)
    most = max(1, MOST_TOKENS.get(device_type, MOST_TOKENS["cpu"]) // seq_len)
    return tuple(size for size in range(1, min(rows, most) + 1) if rows % size == 0)


def choose_micro_rows(
    plan: FreezePlan,
    shape: ModelShape,
    config: TrainConfig,
    *,
    seq_len: int,
    world_size: int,
    device_type: str,
    most: int | None = None,
    **limits: Any,
) -> int:
    """Rows of a micro-batch: the largest that fits as one row does, in every phase of the plan; one when none does.

    Args:
        plan: What trains.
        shape: Sizes of the model.
        config: Training section.
        seq_len: Tokens per row.
        world_size: Workers.
        device_type: `cuda` or `cpu`.
        most: Rows that were found to fit; None when nothing was tried.
        limits: Further arguments of `choose_placement`.
    """
    limits |= {"seq_len": seq_len, "world_size": world_size, "device_type": device_type}
    sizes = list_sizes(config, world_size=world_size, seq_len=seq_len, device_type=device_type)
    phases = [phase for _, phase in plan.list_distinct_phases()]
    fitting = (
        size
        for size in reversed(sizes)
        if (most is None or size <= most) and all(_fits(phase, shape, config, size, limits) for phase in phases)
    )
    return next(fitting, 1)


def settle_micro_rows(config: TrainConfig, rows: int) -> TrainConfig:
    """The config with a number in place of `auto`."""
    return config.model_copy(update={"micro_batch_size": rows})


def _fits(plan: FreezePlan, shape: ModelShape, config: TrainConfig, size: int, limits: dict[str, Any]) -> bool:
    """Whether a size fits under the placement that one row has, with no more layers recomputed and gradients sent no oftener."""
    one, _ = choose_placement(plan, shape, settle_micro_rows(config, 1), **limits)
    placement, estimate = choose_placement(plan, shape, settle_micro_rows(config, size), **limits)
    is_same = replace(placement, reduces_each=one.reduces_each) == one and placement.reduces_each <= one.reduces_each
    return is_same and estimate.total <= HEADROOM * limits["available_bytes"]
