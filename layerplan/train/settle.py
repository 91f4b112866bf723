"""What a worker settles before its model is built: rows, compiling, how the loss is computed, attention, placement.

Memory is predicted twice. Before anything is asked of a model that may have to be read as a whole, by what is kept at least;
and once attention and compiling are known, by what they keep.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from layerplan.config.train import TrainConfig
from layerplan.errors import TrainingError
from layerplan.plan.attention import CAUSAL, name_kept
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.memory import MemoryEstimate, choose_placement, choose_placements, explain_shortage
from layerplan.plan.micro_batch import choose_micro_rows, settle_micro_rows
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement
from layerplan.train.allocator import return_large_blocks
from layerplan.train.attention import choose_attention
from layerplan.train.compiling import settle_compile
from layerplan.train.loss_proof import agree_on_document_fault, agree_on_recipe, find_blocks_fault
from layerplan.train.request import TrainRequest


@dataclass(frozen=True)
class Settled:
    """What was decided."""

    recipe: LossRecipe
    """How the loss is computed."""
    config: TrainConfig
    """With every `auto` settled."""
    placement: Placement
    """Of the phase at hand."""
    estimate: MemoryEstimate
    """Of it."""


def settle(
    request: TrainRequest,
    plan: FreezePlan,
    shape: ModelShape,
    device: torch.device,
    skeleton: nn.Module,
    *,
    rank: int,
    most_rows: int | None,
    **limits: Any,
) -> Settled:
    """Decides all of it; a collective.

    Args:
        request: The run.
        plan: Of the phase at hand.
        shape: Sizes of the model.
        device: Where the worker computes.
        skeleton: The model without memory.
        rank: Of this worker.
        most_rows: As for `fit_into_memory`.
        limits: Further arguments of `choose_placement`, the attention left out.

    Raises:
        ModelError: When the loss cannot be computed exactly.
        TrainingError: When nothing fits into memory, or the config names an attention that the device or the model lacks.
    """
    workers = {"seq_len": limits["seq_len"], "world_size": limits["world_size"]}
    limits |= {"most_rows": most_rows}
    lean = request.config.assume_compile()
    config, placement, _ = fit_into_memory(request, lean, plan, shape, attention=CAUSAL, **limits)
    _keep_heaps_small(placement, device)
    torch.manual_seed(request.seed)
    asked = replace(request, config=settle_micro_rows(request.config, config.micro_rows))
    settle_compiling = settle_compile(asked, plan, shape, device, **workers)
    recipe, config, attention = ask_whole_model(asked, shape, device, settle_compiling, skeleton, rank=rank, **workers)
    config = config.model_copy(update={"micro_batch_size": request.config.micro_batch_size})
    limits["adds_up"] = request.labels is not None or recipe.rows in ("alone", "reset")
    config, placement, estimate = fit_into_memory(
        request, config, plan, shape, attention=name_kept(attention, recipe), **limits
    )
    _keep_heaps_small(placement, device)
    return Settled(recipe, config, replace(placement, attention=attention), estimate)


def _keep_heaps_small(placement: Placement, device: torch.device) -> None:
    if device.type == "cpu" and placement.parallelism == "shard":
        return_large_blocks()


def fit_into_memory(
    request: TrainRequest,
    config: TrainConfig,
    plan: FreezePlan,
    shape: ModelShape,
    *,
    most_rows: int | None,
    **limits: Any,
) -> tuple[TrainConfig, Placement, MemoryEstimate]:
    """Settles rows and placement by predicted memory.

    Args:
        request: The run, whose whole plan has to fit.
        config: Its training section; rows may be `auto`.
        plan: Of the phase at hand.
        shape: Sizes of the model.
        most_rows: Of a micro-batch that is chosen; None when none was found not to fit.
        limits: Further arguments of `choose_placement`.

    Raises:
        TrainingError: When some phase does not fit; the message says by how much and what helps.
    """
    if config.micro_batch_size == "auto":
        config = settle_micro_rows(config, choose_micro_rows(request.plan, shape, config, most=most_rows, **limits))
    largest, available = choose_placements(request.plan, shape, config, **limits), limits["available_bytes"]
    needed = largest.estimate.total + (largest.parked_bytes if limits["device_type"] == "cpu" else 0)
    if needed > available:
        where = f" in the phase from step {largest.start_step}" if request.plan.phases else ""
        raise TrainingError(
            f"the run does not fit into memory{where}. {explain_shortage(largest.estimate, available, config)}"
        )
    return config, *choose_placement(plan, shape, config, **limits)


def ask_whole_model(
    request: TrainRequest,
    shape: ModelShape,
    device: torch.device,
    settle_compiling: Callable[[LossRecipe], TrainConfig],
    skeleton: nn.Module,
    *,
    seq_len: int,
    rank: int,
    world_size: int,
) -> tuple[LossRecipe, TrainConfig, str]:
    """How the loss is computed, the config that `settle_compiling` makes of that, and the attention.

    What only a whole model can tell is asked by rank 0 of one of its own; the skeleton tells what layers ask of attention.

    Raises:
        ModelError: When the loss cannot be computed exactly.
        TrainingError: When the config names an attention that the device or the model does not have.
    """
    load = lru_cache(maxsize=1)(request.model.load)
    workers = {"seq_len": seq_len, "rank": rank, "world_size": world_size}
    recipe = request.recipe or agree_on_recipe(load, **workers)
    if not request.document_mask:
        recipe = replace(recipe, rows="whole")
    config = settle_compiling(recipe)
    attention = choose_attention(
        config,
        shape,
        seq_len,
        device,
        recipe,
        find_fault=lambda name: agree_on_document_fault(load, recipe, name, **workers),
        find_blocks_fault=lambda: find_blocks_fault(skeleton, recipe),
        agree=lambda names: agree_on_order(names, world_size),
    )
    load.cache_clear()
    gc.collect()  # the whole model is gone before anybody reads a part of it
    return recipe, config, attention


def agree_on_order(names: list[str], world_size: int) -> list[str]:
    """That of rank 0: each has timed its own card, and all must ask the same and predict the same memory."""
    chosen = [names]
    if world_size > 1:
        dist.broadcast_object_list(chosen, src=0)
    return chosen[0]
