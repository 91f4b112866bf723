"""Where parameters live: whole on every worker, or FSDP2 shards in units aligned with the plan.

Order, because each step depends on the one before: build -> apply the plan -> `place_model` -> build the optimizer. A model
that was built without memory gets its values once it is placed, so that no worker holds more of it than it keeps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from layerplan.config.train import TrainConfig
from layerplan.models.causal_lm import DecoderParts, find_decoder_parts
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.placement import Placement
from layerplan.train.activation import checkpoint_layers
from layerplan.train.float32_sums import list_outside, looks_up_biases, sum_in_float32
from layerplan.train.fsdp_units import list_mixed, list_units
from layerplan.train.materialize import ParameterSource, fill_parameters
from layerplan.train.replicate import GradientReducer
from layerplan.train.step import LossModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlacedModel:
    """A model ready for its optimizer."""

    model: LossModel
    masters: dict[int, Tensor] = field(default_factory=dict)
    """id of a low-precision trained parameter to its float32 original."""
    set_sync: Callable[[bool], None] | None = None
    """Told before each backward pass whether it is the step's last; None where that makes no difference."""
    finish_sync: Callable[[], None] | None = None
    """Called after the last backward pass."""
    reduce_square: Callable[[Tensor], Tensor] | None = None
    """Sums a squared norm over shards."""
    reducer: GradientReducer | None = None
    """Present under replication over several workers."""

    def release(self) -> None:
        """Lets go of the parameters; hooks on them would keep model and reducer alive."""
        if self.reducer is not None:
            self.reducer.close()


def place_model(
    causal_lm: nn.Module,
    plan: FreezePlan,
    config: TrainConfig,
    placement: Placement,
    *,
    world_size: int,
    device: torch.device,
    recipe: LossRecipe | None = None,
    loss_model: Callable[..., LossModel] = LossModel,
    source: ParameterSource | None = None,
) -> PlacedModel:
    """Casts, compiles, checkpoints and distributes the model the plan was applied to.

    Args:
        causal_lm: The model; its parameters have values, or are on the meta device.
        plan: The plan.
        config: Training section.
        placement: Where parameters live.
        world_size: Workers.
        device: Where they compute.
        recipe: How the loss is computed.
        loss_model: What computes it.
        source: Where the values are of parameters on the meta device; None when all are there.
    """
    parts = find_decoder_parts(causal_lm)
    masters = cast_for_training(causal_lm, config, placement)
    is_sharded_first = source is not None and placement.parallelism == "shard" and not config.frozen_fp8
    if source is not None and not is_sharded_first:
        masters |= fill_parameters(causal_lm, source, device)
    if not is_sharded_first:
        causal_lm.to(device)
    if config.frozen_fp8:
        from layerplan.train.fp8 import convert_frozen_layers

        convert_frozen_layers(parts, plan)
    sums_in_16_bits = device.type == "cpu" and config.compute_dtype != "float32"
    uncompiled = set(range(len(parts.layers)))
    if config.compiles:
        has_units = placement.parallelism == placement.frozen_sharding == "shard"
        uncompiled = set(plan.trainable_modules) if has_units else set()
        if sums_in_16_bits:
            uncompiled |= {index for index, layer in enumerate(parts.layers) if looks_up_biases(layer)}
        compile_layers(parts, left_out=uncompiled)
    if sums_in_16_bits:
        has_dense_head = placement.parallelism == "replicate" and loss_model is LossModel
        alone = list_outside(causal_lm, parts.layers) + [parts.layers[index] for index in uncompiled]
        sum_in_float32(alone, added_to=parts.lm_head.weight if has_dense_head else None)
    checkpoint_layers(parts.layers, placement.checkpointed_layers)
    model = loss_model(causal_lm, recipe, z_weight=config.z_loss, compiled=config.compiles)
    if placement.parallelism == "replicate":
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if model.makes_several(config, world_size):
            _accumulate_in_float32(trained)
        if world_size == 1:
            return PlacedModel(model, masters)
        reducer = GradientReducer(trained, world_size)
        return PlacedModel(model, masters, reducer.set_sync, reducer.finish, reducer=reducer)
    mesh = make_mesh(device.type, world_size, config.num_replicas)
    shard_model(model, parts, plan, config, placement, mesh)
    if source is not None and is_sharded_first:
        fill_parameters(causal_lm, source, device)
    shards = mesh["shard"].get_group() if mesh.ndim > 1 else mesh.get_group()

    def reduce_square(square: Tensor) -> Tensor:
        dist.all_reduce(square, group=shards)
        return square

    set_sync = None if placement.reduces_each else model.set_requires_gradient_sync
    return PlacedModel(model, masters, set_sync, reduce_square=reduce_square)


def cast_for_training(causal_lm: nn.Module, config: TrainConfig, placement: Placement) -> dict[int, Tensor]:
    """Puts parameters into the dtypes the placement wants and returns the float32 originals it rounded.

    Frozen parameters take the compute dtype. Trained ones do too under replication, where the optimizer keeps their
    float32 masters; FSDP keeps float32 shards and casts when it gathers.
    """
    dtype = getattr(torch, config.compute_dtype)
    masters = {}
    for parameter in causal_lm.parameters():
        wanted = torch.float32 if parameter.requires_grad and placement.parallelism == "shard" else dtype
        if parameter.requires_grad and wanted != torch.float32 and not parameter.is_meta:
            masters[id(parameter)] = parameter.data.float()
        parameter.data = parameter.data.to(wanted)
    return masters


def compile_layers(parts: DecoderParts, left_out: Collection[int] = ()) -> None:
    """Compiles each decoder layer's forward pass; a plan that changes needs `reset_compiled` first.

    Layers to leave out are those that hold several FSDP units, whose hooks would cut their graphs into pieces, and those whose
    gradients the compiler would sum in 16 bits.

    Layers of one kind share their graphs. More variants than a plan can cause would mean silent eager execution, so
    reaching the recompile limit is an error, unless errors of the compiler are let be (`train.compile: auto`).
    """
    torch._dynamo.config.recompile_limit = 32
    torch._dynamo.config.fail_on_recompile_limit_hit = not torch._dynamo.config.suppress_errors
    if left_out:
        logger.info(
            "%d layers are not compiled: in several sharded units, or with gradients that it would round", len(left_out)
        )
    for index, layer in enumerate(parts.layers):
        if index in left_out:
            continue
        layer.forward = torch.compile(layer.forward, dynamic=False)


def reset_compiled() -> None:
    """Forgets compiled graphs, which hold on to which parameters trained."""
    torch._dynamo.reset()


def make_mesh(device_type: str, world_size: int, num_replicas: int) -> DeviceMesh:
    """One dimension, or (replicas, shards) for hybrid sharding over several nodes."""
    if num_replicas == 1:
        return init_device_mesh(device_type, (world_size,))
    return init_device_mesh(
        device_type, (num_replicas, world_size // num_replicas), mesh_dim_names=("replicate", "shard")
    )


def shard_model(
    model: LossModel, parts: DecoderParts, plan: FreezePlan, config: TrainConfig, placement: Placement, mesh: DeviceMesh
) -> None:
    """Makes one FSDP unit per decoder layer and per side of the plan; no unit mixes trained and frozen parameters.

    The head stays in the root unit, because the loss reads its weight without calling its forward pass.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = getattr(torch, config.compute_dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    ignored: set[nn.Parameter] = set()
    if placement.frozen_sharding == "replicate":
        ignored = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    trained = set(plan.trainable_layers)
    lowest = None if plan.train_embeddings else min(trained, default=None)
    for index, layer in enumerate(parts.layers):
        if index in plan.trainable_modules:
            ignored |= list_mixed(layer)
        if any(parameter not in ignored for parameter in layer.parameters()):
            # a frozen layer above trained ones is needed again in backward: gathered once is cheaper
            again = index not in trained and trained and index > min(trained)
            for module in list_units(layer, ignored):
                fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=not again, ignored_params=ignored)
            if index == lowest:
                fetch_nothing_below(layer)
    head_trains = parts.lm_head.weight.requires_grad
    for module in (parts.embeddings, parts.final_norm):
        others = [p for p in module.parameters() if p is not parts.lm_head.weight and p not in ignored]
        if others and others[0].requires_grad != head_trains:
            fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=ignored or None)


def fetch_nothing_below(layer: nn.Module) -> None:
    """Keeps the units of the layer at which backward ends from gathering the unit that ran before them, whose turn never comes.

    FSDP takes a list of units to gather ahead in place of the one before; a unit that is gathered already is left alone.
    """
    from torch.distributed.fsdp import FSDPModule

    for unit in layer.modules():
        if isinstance(unit, FSDPModule):
            unit.set_modules_to_backward_prefetch([unit])


def reshard(model: nn.Module) -> None:
    """Puts every FSDP unit back into shards.

    Backward does this; a forward pass without one leaves the root unit gathered, and `parameters()` then yields
    tensors the optimizer has never seen.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _accumulate_in_float32(parameters: list[nn.Parameter]) -> None:
    """Sums of micro-batch gradients lose bits in bfloat16."""
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32
