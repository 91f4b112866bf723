"""A worker's model, made ready: loaded, planned, placed, with its optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from layerplan.checkpoint.dcp import Parked, load_parked
from layerplan.config.train import TrainConfig
from layerplan.errors import TrainingError
from layerplan.models.adapters import count_adapter_params, inject_adapters
from layerplan.models.freezing import AppliedPlan, apply_plan
from layerplan.models.skeleton import Skeleton
from layerplan.plan.cost import GIB
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.memory import MemoryEstimate
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement
from layerplan.storage.paths import StoredPath
from layerplan.train.allocator import use_memory_well
from layerplan.train.attention import IMPLEMENTATIONS, try_set_attention
from layerplan.train.label_step import LabelLossModel
from layerplan.train.materialize import ParameterSource
from layerplan.train.optim import build_optimizer
from layerplan.train.request import TrainRequest
from layerplan.train.settle import settle
from layerplan.train.sharding import PlacedModel, place_model
from layerplan.train.step import LossModel

logger = logging.getLogger(__name__)
_PLACED = {"replicate": "replicated", "shard": "sharded"}


@dataclass(frozen=True)
class BuiltModel:
    """A placed model with its plan, its optimizer and what was predicted of it."""

    placed: PlacedModel
    applied: AppliedPlan
    optimizer: torch.optim.Optimizer
    placement: Placement
    estimate: MemoryEstimate
    available_bytes: float
    parked: Parked
    """What other phases of the plan train."""
    recipe: LossRecipe
    """How its loss is computed."""
    config: TrainConfig
    """The training section with every `auto` settled that a worker settles."""
    device: torch.device
    plan: FreezePlan
    """Of the phase at hand."""
    has_labels: bool
    """Whether its rows are prompts with a label."""


def build_model(
    request: TrainRequest,
    plan: FreezePlan,
    shape: ModelShape,
    device: torch.device,
    *,
    seq_len: int,
    rank: int,
    world_size: int,
    local_world_size: int,
    checkpoint: StoredPath | None = None,
    most_rows: int | None = None,
) -> BuiltModel:
    """Settles the placement, builds the base without memory, applies the plan, places it, and builds the optimizer.

    Args:
        request: The run.
        plan: The plan of the phase at hand; the run's own when it does not change.
        shape: Sizes of the model.
        device: Where the worker computes.
        seq_len: Tokens per row.
        rank: Of this worker.
        world_size: Workers.
        local_world_size: Workers on this machine.
        checkpoint: Of the phase before; gives what this phase does not train.
        most_rows: Of a micro-batch, where that is chosen; None when none was found not to fit.

    Raises:
        TrainingError: When the device lacks the dtype, or the prediction does not fit into memory.
    """
    config = request.config
    check_dtype(config.compute_dtype, device)
    check_mamba_kernels(config.mamba_kernels, device)
    available = agree_on_memory(find_available_bytes(device, local_world_size), device)
    lora = None if request.labels is None else request.labels.lora
    skeleton = request.model.skeleton()
    causal_lm = skeleton.model
    adapters = 0 if lora is None else count_adapter_params(causal_lm, plan.trainable_layers, lora)
    limits = {"seq_len": seq_len, "world_size": world_size, "device_type": device.type}
    limits |= {"available_bytes": available, "adapter_params": adapters}
    settled = settle(request, plan, shape, device, causal_lm, rank=rank, most_rows=most_rows, **limits)
    recipe, config, placement = settled.recipe, settled.config, settled.placement
    try_set_attention(causal_lm, IMPLEMENTATIONS[placement.attention])
    parked, source = park_other_phases(skeleton, request.plan, plan, checkpoint)
    applied = apply_plan(causal_lm, plan)
    if lora is not None:
        applied = inject_adapters(causal_lm, plan.trainable_layers, lora, seed=request.seed)
    choose_mamba_kernels(causal_lm, config.mamba_kernels)  # not before the model was asked, on the CPU
    causal_lm.train()
    placed = place_model(
        causal_lm,
        plan,
        config,
        placement,
        world_size=world_size,
        device=device,
        recipe=recipe,
        loss_model=choose_loss_model(request, placement),
        source=source,
    )
    optimizer = build_optimizer(placed.model, config.optimizer, masters=placed.masters, compiled=config.compiles)
    placed.masters.clear()
    if device.type == "cpu":
        use_memory_well(placed.model, is_sharded=placement.parallelism == "shard")
    if rank == 0:
        logger.info(render_placement(placement, settled.estimate, available, applied, config))
    facts = {"config": config, "device": device, "plan": plan, "has_labels": request.labels is not None}
    return BuiltModel(placed, applied, optimizer, placement, settled.estimate, available, parked, recipe, **facts)


def choose_loss_model(request: TrainRequest, placement: Placement) -> Callable[..., LossModel]:
    """What computes the loss: of every token, or of the labels of prompts.

    Raises:
        TrainingError: When layers that train one at a time would be sharded or recomputed, or adapters sharded.
    """
    options = request.labels
    if options is None:
        return LossModel
    if options.trains_alone and (placement.parallelism == "shard" or placement.checkpointed_layers):
        raise TrainingError(
            "finetune.method=lift: trains one layer at a time, which sharded and recomputed layers cannot; use"
            " train.parallelism=replicate and train.activation_checkpointing=none"
        )
    if options.lora is not None and placement.parallelism == "shard":
        raise TrainingError("finetune.update=lora: adapters are trained whole; use train.parallelism=replicate")
    return partial(LabelLossModel, options=options)


def park_other_phases(
    skeleton: Skeleton, whole: FreezePlan, plan: FreezePlan, checkpoint: StoredPath | None
) -> tuple[Parked, ParameterSource]:
    """Takes aside what the whole plan trains and this phase does not, at its newest values.

    Returns:
        What was taken aside, and where the values of the model are: these among them.
    """
    model, reader = skeleton.model, skeleton.reader
    if not whole.phases:
        return Parked(), ParameterSource(reader)
    names = apply_plan(model, whole).trainable - apply_plan(model, plan).trainable
    frozen = {name: value for name, value in model.named_parameters() if name in names}
    if checkpoint is None:
        return Parked({name: reader.read(name, dtype=torch.float32) for name in frozen}), ParameterSource(reader)
    parked = load_parked(checkpoint, frozen, keep_moments=whole.optimizer_state == "keep")
    return parked, ParameterSource(reader, parked.weights)


def check_dtype(name: str, device: torch.device) -> None:
    """Refuses a compute dtype the device lacks.

    Raises:
        TrainingError: Naming the device and what to use instead.
    """
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise TrainingError(
            f"train.compute_dtype=bfloat16: {torch.cuda.get_device_name(device)} has no bfloat16; use float32"
        )


def check_mamba_kernels(name: str, device: torch.device) -> None:
    """Raises `TrainingError` when kernels that were asked for cannot run here, saying how they are installed."""
    if name == "torch":
        return
    from layerplan.models.hybrid.mamba_kernels import find_kernel_fault

    fault = find_kernel_fault(name, device.type)
    if fault is not None:
        raise TrainingError(f"train.mamba_kernels={name}: {fault}")


def choose_mamba_kernels(causal_lm: nn.Module, name: str) -> None:
    """Has Mamba2 layers scanned by kernels of this name; raises `TrainingError` when it is not the default and there are none."""
    if name == "torch":
        return
    from layerplan.models.hybrid.mamba_mixer import set_mamba_kernels

    if not set_mamba_kernels(causal_lm, name):
        raise TrainingError(
            f"train.mamba_kernels={name}: the model has no Mamba2 layers of a hybrid (docs/hybrids.md); leave it out"
        )


def find_available_bytes(device: torch.device, local_world_size: int) -> float:
    """Free memory one worker may use: of its GPU, or its share of the machine's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    return float(psutil.virtual_memory().available) / max(1, local_world_size)


def agree_on_memory(available: float, device: torch.device) -> float:
    """The smallest over the workers, so that all choose the same placement."""
    value = torch.tensor([available], dtype=torch.float64, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return float(value[0])


def render_placement(
    placement: Placement, estimate: MemoryEstimate, available: float, applied: AppliedPlan, config: TrainConfig
) -> str:
    """What was decided at start, in one line."""
    unused = placement.explain_unused(config)
    return (
        f"{len(applied.trainable)} parameters train, {len(applied.frozen)} are frozen;"
        f" parallelism {placement.parallelism}"
        + (f", frozen parameters {_PLACED[placement.frozen_sharding]}" if placement.parallelism == "shard" else "")
        + (f", {unused}" if unused else "")
        + f", attention {placement.attention}, {len(placement.checkpointed_layers)} layers recomputed"
        + (", gradients sent after every micro-batch" if placement.reduces_each else "")
        + f"; memory predicted {estimate.total / GIB:.2f} GiB of {available / GIB:.2f} GiB per worker"
    )
